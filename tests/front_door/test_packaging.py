"""A wheel used from another folder, and a bare checkout, both find every part."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import dawm

ROOT = Path(__file__).parents[2]
PROBE = "import dawm, dawm.callbacks, dawm.lightning_configs; print(dawm.__file__, dawm.callbacks.__file__)"


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_wheel_holds_everything_and_works_elsewhere(tmp_path):
    copy = tmp_path / "source"  # what an earlier build or install left in the checkout would be packed too
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("dawm", "callbacks", "lightning_configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(copy), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(target)
    for name in (
        "dawm/callbacks/regenerate.py",
        *(f"dawm/{path.relative_to(ROOT)}" for path in (ROOT / "lightning_configs").rglob("*.yaml")),
        "dawm/data/sources/policies/hopper.safetensors",
        "dawm/data/sources/policies/LICENSE.txt",
        "dawm/py.typed",
        "dawm/cli/report_template.html",
    ):
        assert name in names
    assert not any(name.startswith(("tests/", "benchmarks/", "callbacks/", "examples/", "docs/")) for name in names)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -S leaves the editable install's import hook out
    script = f"import sys; sys.path[:0] = [{str(target)!r}]; {PROBE}"
    assert str(target) in run("-c", script, cwd=elsewhere).split()[0]


def test_bare_checkout_works_uninstalled(tmp_path):
    """The folder alone, found through the current directory, with callbacks/ beside dawm/."""
    for folder in ("dawm", "callbacks", "lightning_configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    script = f"import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; {PROBE}"
    out = run("-c", script, cwd=tmp_path).split()
    assert out[1].endswith("callbacks/__init__.py")


def test_the_mathematics_loads_no_lightning():
    """Neither itself nor by what it imports: whoever wants a sampler alone does not wait for Lightning."""
    modules = (
        "data.returns data.transitions data.sources.scores nn.normalizer nn.mlp diffusion.preconditioning "
        "diffusion.samplers diffusion.denoisers diffusion.codecs evaluation.episodes"
    )
    imports = ", ".join(f"dawm.{module}" for module in modules.split())
    run("-c", f"import sys, {imports}; assert 'lightning' not in sys.modules", cwd=ROOT)


def test_one_version_everywhere():
    for name, pattern in (("CHANGELOG.md", r"^## (\S+)"), ("CITATION.cff", r"^version: (\S+)")):
        found = re.search(pattern, (ROOT / name).read_text(), re.M)
        assert found is not None
        assert found[1] == dawm.__version__, name
