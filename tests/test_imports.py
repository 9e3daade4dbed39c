"""Inside dlrt/ imports run one way only, and it imports nothing from the folders of scripts."""

import ast
from pathlib import Path

import sklearn.base

import dlrt

ROOT = Path(__file__).parents[1]
ORDER = [
    ["checks", "cluttered_digits", "timing", "hooks", "errors"],
    ["lowrank", "plots", "flags", "markup"],
    ["option_fields"],
    ["augmented", "ranks", "replacing", "products", "blocks"],
    ["layers"],
    ["linear", "factors"],
    ["integrators"],
    ["thin_convolutions"],
    ["velocity", "curvature", "fields", "attention", "convolutions", "streaming"],
    ["moments", "adapters", "convertible"],
    ["lora"],
    ["costs"],
    ["convert", "distributed", "settings", "pendulum"],
    ["weight_step", "step_checks"],
    ["network_step"],
    ["averaging", "export", "optimizer", "pretrained"],
    ["baselines", "hub"],
    [
        "models",
        "models.alexnet",
        "models.convnet",
        "models.efficientnet",
        "models.gpt",
        "models.lenet5",
        "models.mlp",
        "models.resnet",
        "models.vgg",
        "data",
    ],
    ["text", "data_files"],
    ["picture_sets"],
    ["datasets", "checkpoint"],
    ["options", "runs"],
    ["low_rank_options", "summaries", "continuing"],
    ["run_network", "run_optimizer"],
    ["training", "tables", "grid"],
    ["tuning"],
    ["cams.imputation"],
    ["cams.targets", "cams.pictures", "cams.methods", "cams.spatial", "cams.faithfulness"],
    ["cams.compare", "cams.group_tests", "cams.guided", "cams.explain", "cams.figure", "cams.networks"],
    ["cams.known"],
    ["cams"],
    ["cams.batch_maps", "cams.randomised", "cams.build_networks", "cams.load_pictures", "cams.network_flags"],
    [
        "cams.drawings",
        "cams.map_records",
        "cams.map_times",
        "cams.measure",
        "cams.study_results",
        "cams.summary",
    ],
    ["cams.comparison", "cams.page", "cams.study"],
    ["script"],
    ["__main__"],
]


def modules():
    for path in sorted((ROOT / "dlrt").rglob("*.py")):
        yield ".".join(path.relative_to(ROOT / "dlrt").with_suffix("").parts).removesuffix(".__init__"), path


def imported(path, walk=ast.walk):
    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_imports_inside_the_library_run_one_way():
    level = {name: number for number, names in enumerate(ORDER) for name in names}
    for name, path in modules():
        if name == "__init__":
            continue
        assert name in level, f"{name} has no place in ORDER yet"
        for target in imported(path):
            target = target.removeprefix("dlrt.")
            if target in level and target != name and not target.startswith(f"{name}."):
                assert level[target] < level[name], f"{name} imports {target}"


def test_models_know_nothing_of_low_rank():
    for name, path in modules():
        if name.startswith("models."):
            assert not [target for target in imported(path) if target.startswith("dlrt")], name


def test_the_library_imports_no_script():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"dlrt"}
    for _, path in modules():
        assert not [target for target in imported(path) if target.split(".")[0] in folders]


def test_whoever_imports_dlrt_does_not_wait_for_scikit_learn():
    for name, path in modules():
        targets = set(imported(path, ast.iter_child_nodes))
        assert name == "streaming" or not [target for target in targets if target.startswith("sklearn")]
        assert "dlrt.streaming" not in targets
    assert issubclass(dlrt.StreamingPCA, sklearn.base.BaseEstimator)
