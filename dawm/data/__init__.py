"""Data: recorded episodes, the shapes they travel in, and the data module that draws batches.

Only the shapes are named here: everything uses them, and readers of files and Lightning are slow to import.
"""

from dawm.data.transitions import Segments, Transitions

__all__ = ["Segments", "Transitions"]
