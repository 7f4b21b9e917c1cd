"""The house: modules import downwards only, shared code names nobody, and light things stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import domainbed
from domainbed import registry

ROOT = Path(domainbed.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# From the top to the bottom; a module may import those before it, and those of its own entry.
LAYERS = [
    ["seeding", "console", "machine", "messages", "overrides", "paired", "intervals", "ranks", "table_formats"],
    ["metadata"], ["manifests", "feature_files"], ["registry"],
    ["lib.distributions", "lib.supervised_contrast", "lib.lars", "lib.weight_average"],
    ["lib.misc", "lib.fast_data_loader", "lib.wide_resnet", "lib.query"],
    ["images"], ["augmentation"], ["image_cache"], ["input_pipelines"],
    ["downloading", "unpacking"], ["releases"],
    ["interruption"],
    ["datasets"], ["mask_files"], ["splits"], ["partitions"], ["loaders"], ["samples"], ["notices"], ["backbones"],
    ["networks"],
    ["feature_maps"], ["branches"], ["attribution"], ["masking"], ["similarities"], ["maskers"],
    ["stages", "logistic_regression"],
    ["algorithms", "algorithms_ex2l"], ["hparams_registry"],
    ["explainers", "subsets", "explanation_metrics", "feature_scores"], ["evaluation", "features", "scores"],
    ["records"], ["loggers"], ["explanation_records"], ["cards"],
    ["lib.reporting"], ["holders"], ["claims"], ["run_directory"], ["states"], ["state_trees"],
    ["snapshots"], ["training"], ["inferred_confounders"],
    ["rows"], ["model_selection"], ["condensing"], ["run_index"], ["pairs"], ["tables"],
    ["group_tables"],
    ["paper_tables", "efficiency_tables", "selection_tables", "rank_tables", "per_group_tables", "budget_tables"],
    ["control_tables", "screening_tables", "explanation_tables", "figures", "curve_figures", "record_figures"],
    ["budget_figures"],
    ["sweep_rows"], ["commands"], ["jobs"],
    ["refit"], ["job_lists"], ["status_tables", "plans"], ["children", "fork_server"], ["pool"], ["slurm_tasks"],
    ["slurm"], ["command_launchers"], ["saved_models"], ["predictors"], ["report"],
    ["scripts"], ["api"],
]  # fmt: skip
EDGE = {"scripts"}  # where names may stand as defaults of flags


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank(module: str) -> int | None:
    for position, layer in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in layer):
            return position
    return None


def imported(tree: ast.Module) -> set[str]:
    """Every domainbed module that the source imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("domainbed.") for name in found if name.startswith("domainbed.")}
    return {name for name in names if rank(name) is not None}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_module_has_a_layer_and_imports_downwards_only(path: Path) -> None:
    module = dotted(path)
    if module in ("", "lib"):
        return
    own = rank(module)
    assert own is not None, f"{module} stands in no layer: add it to LAYERS and to the map in domainbed/__init__.py"
    upward = {name for name in imported(ast.parse(path.read_text())) if (rank(name) or 0) > own}
    assert not upward, f"{module} imports from below itself: {upward}"


def test_an_upward_import_is_seen() -> None:
    tree = ast.parse("def f():\n    from domainbed import training\n    import domainbed.tables")
    assert imported(tree) == {"training", "tables"}


def test_ex2l_imports_only_what_it_is_made_of_and_what_it_hands_on() -> None:
    names = imported(ast.parse((ROOT / "algorithms_ex2l.py").read_text()))
    own = {".".join(name.split(".")[:2]) for name in names if rank(name) == rank("algorithms")}
    assert own == {f"algorithms.{name}" for name in ("base", "explained", "two_networks", "align")}


def strings(tree: ast.Module) -> set[str]:
    """The string literals of a source that are no docstrings."""
    docs = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            docs.add(id(body[0].value))
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs)
    return {node.value for node in constants if isinstance(node.value, str)}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_shared_code_names_no_algorithm_and_no_dataset(path: Path) -> None:
    top = dotted(path).partition(".")[0]
    if top in {"algorithms", "algorithms_ex2l", "datasets", *EDGE}:
        return
    known = {name for kind in ("algorithms", "datasets") for name in (*registry.order(kind), *registry.names(kind))}
    assert not strings(ast.parse(path.read_text())) & known


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("script", ["sweep", "collect_results", "report"])
def test_scripts_that_only_read_files_do_not_import_torch(script: str) -> None:
    assert "torch" not in modules_after(f"import domainbed.scripts.{script}")


def test_training_imports_no_heavy_package_that_it_does_not_need() -> None:
    heavy = {"wilds", "timm", "torchvision", "sklearn", "skimage", "pandas", "matplotlib"}
    assert not modules_after("import domainbed.scripts.train") & heavy


def test_the_light_reading_of_class_attributes_agrees_with_the_classes() -> None:
    from domainbed import algorithms, datasets

    assert registry.names("algorithms") == algorithms.ALGORITHMS
    assert registry.names("datasets") == datasets.DATASETS
    for name in algorithms.ALGORITHMS:
        assert registry.attribute("algorithms", name, "PARTITION", "environment") == getattr(algorithms, name).PARTITION
    for name in datasets.DATASETS:
        assert registry.domainbed_environments(name) in (None, datasets.get_dataset_class(name).ENVIRONMENTS)
        for attribute in ("ENVIRONMENTS", "TEST_ENVS", "VALIDATION_ENVS", "HPARAMS", "HPARAMS_SIZE", "NEEDS_DATA_DIR"):
            actual = getattr(datasets.get_dataset_class(name), attribute)
            assert (
                registry.attribute("datasets", name, attribute, getattr(datasets.MultipleDomainDataset, attribute))
                == actual
            )
