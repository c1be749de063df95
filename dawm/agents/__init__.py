"""Offline agents; each is selected by its class path."""

from dawm.agents.base import OfflineAgent
from dawm.agents.iql import IQL
from dawm.agents.td3_bc import TD3BC

__all__ = ["IQL", "OfflineAgent", "TD3BC"]
