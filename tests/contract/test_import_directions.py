"""Who may import what (docs/architecture.md). Imports inside functions count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "optuna", "wandb")


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def users_of(package: str) -> set[str]:
    files = [*ROOT.glob("tuner/**/*.py"), *ROOT.glob("model/**/*.py")]
    return {
        str(path.relative_to(ROOT))
        for path in files
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }


def test_ray_optuna_and_wandb_stay_where_they_belong() -> None:
    of_ray = {"tuner/cluster.py", "tuner/jobs.py", "tuner/nodes.py", "tuner/pack_actors.py", "tuner/search.py"}
    assert users_of("ray") == of_ray
    optuna_users = {name for name in users_of("optuna") if not name.startswith("tuner/tracking/")}
    assert optuna_users == {
        "tuner/draw.py",
        "tuner/importance.py",
        "tuner/repeats.py",
        "tuner/sampler.py",
        "tuner/storage.py",
        "tuner/study.py",
    }
    assert users_of("fsspec") == {"tuner/datasets.py", "tuner/remote.py"}
    assert users_of("pyarrow") == {"tuner/remote.py"}
    assert users_of("sqlalchemy") == {"tuner/storage.py"}
    assert all(name.startswith("tuner/tracking/") for name in users_of("wandb"))
    assert users_of("wandb_workspaces") == {"tuner/tracking/wandb_views.py"}
    assert users_of("tensorboardX") == {"tuner/tracking/tensorboard.py"}
    assert users_of("onnx") == {"model/export.py"}
    assert users_of("onnxruntime") == {"model/export.py", "model/deployed.py"}


def test_the_model_knows_nothing_of_the_tuner() -> None:
    assert not [name for name in users_of("tuner") if name.startswith("model/")]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("tuner/space.py", ("ray", "optuna", "torch")),
        ("tuner/space_file.py", ("ray", "optuna", "torch")),
        ("tuner/single.py", ("ray", "optuna", "wandb", "tuner.search", "tuner.sampler", "tuner.pipeline")),
        ("tuner/collection.py", ("ray", "optuna", "torch", "wandb", "tuner.search", "tuner.sampler", "tuner.trial")),
        (
            "tuner/nodes.py",
            ("optuna", "wandb", "torch", "tuner.search", "tuner.session", "tuner.trial", "tuner.pipeline"),
        ),
        ("tuner/datasets.py", ("ray", "optuna", "wandb", "torch", "tuner.run")),
        ("tuner/point.py", ("ray", "optuna", "torch", "wandb", "tuner.run", "tuner.trial")),
        ("tuner/options.py", ("ray", "optuna", "sqlalchemy", "torch")),
        ("tuner/run.py", ("ray", "optuna", "wandb", "tuner.sampler", "tuner.storage")),
        ("tuner/sampler.py", ("torch", "wandb", "ray")),
        ("tuner/race.py", (*HEAVY, "torch", "tuner")),
        ("tuner/selection.py", (*HEAVY, "torch", "tuner.study", "tuner.run", "tuner.report")),
        ("tuner/study.py", ("torch", "wandb", "ray", "tuner.run")),
        ("tuner/repeats.py", ("torch", "wandb", "ray", "tuner.run", "tuner.pipeline")),
        ("tuner/importance.py", ("torch", "wandb", "ray", "tuner.sampler", "tuner.storage")),
        ("tuner/storage.py", ("torch", "wandb", "ray", "tuner.space", "tuner.sampler")),
        ("tuner/search.py", ("wandb", "model.network", "model.losses")),
        ("tuner/session.py", ("ray", "optuna", "wandb", "torch", "tuner.search")),
        ("tuner/checkpoints.py", ("ray", "optuna", "wandb", "tuner.search", "tuner.session")),
        ("tuner/remote.py", (*HEAVY, "torch", "tuner.run", "tuner.checkpoints", "tuner.mirror", "tuner.session")),
        ("tuner/mirror.py", (*HEAVY, "torch", "tuner.search", "tuner.session", "tuner.sampler", "tuner.pipeline")),
        ("tuner/jobs.py", ("optuna", "wandb", "torch", "tuner.search", "tuner.cluster", "tuner.pipeline")),
        ("tuner/cluster.py", ("optuna", "wandb", "torch", "tuner.search", "tuner.session", "tuner.trial")),
        ("tuner/trial.py", ("ray", "optuna", "wandb")),
        ("tuner/tracing.py", ("ray", "optuna", "wandb", "tuner.trial", "tuner.search", "tuner.run")),
        ("tuner/gpu.py", ("ray", "optuna", "wandb", "tuner.trial", "tuner.search")),
        ("tuner/pack.py", ("ray", "optuna", "wandb", "tuner.search", "tuner.session")),
        ("tuner/pack_actors.py", ("optuna", "wandb", "tuner.search", "tuner.session")),
        ("tuner/shares.py", ("ray", "optuna", "wandb", "torch")),
        ("tuner/use.py", ("ray", "optuna", "wandb", "tuner.search", "tuner.trial")),
        ("tuner/records.py", ("ray", "optuna", "torch")),
        ("tuner/finals.py", ("optuna", "wandb")),
        (
            "tuner/export.py",
            ("ray", "optuna", "wandb", "tuner.search", "tuner.sampler", "tuner.pipeline", "tuner.finals"),
        ),
        ("tuner/plan.py", ("ray", "optuna", "wandb", "torch", "tuner.search", "tuner.sampler", "tuner.pipeline")),
        ("tuner/predict.py", (*HEAVY, "torch", "tuner.run", "tuner.search", "tuner.report", "model.export")),
        ("tuner/masks.py", (*HEAVY, "torch", "tuner.run", "tuner.report", "tuner.search", "tuner.sampler")),
        ("tuner/next_masks.py", (*HEAVY, "torch", "tuner.search", "tuner.predict", "model.export")),
        ("tuner/next_pictures.py", (*HEAVY, "torch", "tuner.run", "tuner.next_masks")),
        ("tuner/photo_results.py", (*HEAVY, "torch", "tuner.run", "tuner.predict", "model.tiles")),
        ("model/uncertainty.py", ("torch", "onnxruntime", "model.deployed")),
        ("tuner/photos.py", (*HEAVY, "torch", "tuner.run", "tuner.predict")),
        ("model/tiles.py", ("torch", "onnxruntime")),
        ("model/crack_size.py", ("torch", "model.tiles")),
        ("tuner/timing.py", ("ray", "optuna", "wandb", "tuner.search", "tuner.sampler", "tuner.run")),
    ],
)
def test_each_module_keeps_to_its_side(module: str, forbidden: tuple[str, ...]) -> None:
    found = imports(ROOT / module)
    assert not [name for name in found if any(name == f or name.startswith(f + ".") for f in forbidden)]


def test_the_report_is_a_pure_function_of_the_run_directory() -> None:
    for path in (ROOT / "tuner" / "report").glob("*.py"):
        assert not imports(path) & {*HEAVY, "torch", "model.data", "model.network"}, path


def test_trackers_decide_nothing() -> None:
    for path in (ROOT / "tuner" / "tracking").glob("*.py"):
        assert not [
            name for name in imports(path) if name.startswith(("ray", "torch", "tuner.search", "tuner.sampler"))
        ]


@pytest.mark.slow
def test_the_model_imports_without_ray_optuna_and_wandb() -> None:
    """In a fresh interpreter in which importing them, albumentations or what exports fails."""
    code = f"""
import sys
for name in {(*HEAVY, "albumentations", "onnx", "onnxscript", "onnxruntime")!r}:
    sys.modules[name] = None
import pkgutil, importlib, model
for module in pkgutil.iter_modules(model.__path__):
    importlib.import_module("model." + module.name)
from model.network import build
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
