"""The configuration tree: what is refused, how it is told, overrides, and that every shipped file loads."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from m2_ds.config import RunConfig, load_config
from m2_ds.engine.setup import deepspeed_config, zero_stage
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import canonical_shapes
from m2_ds.parallel.config import Layout, contrast_groups
from m2_ds.parallel.mesh import Mesh

ROOT = Path(__file__).parents[1]
TREE: dict[str, Any] = {
    "folder": "runs/x",
    "steps": 100,
    "global_batch": 8,
    "tokenizer": "tokenizer",
    "model": {"preset": "test"},
    "data": {"sources": [{"path": "data/a"}, {"path": "data/b"}]},
    "evaluation": {"tasks": [{"kind": "retrieval", "dataset": "data/a", "splits": ["test"]}]},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def told(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        load_config(recipe, overrides)
    assert type(caught.value) is ValueError  # made for people, not pydantic's own
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        # names that do not exist: the nearest one, and all there are
        ("optim.learning_rate=1", ["optim.learning_rate: there is no such field", "weight_decay", "grad_clip"]),
        ("optim.weight_deca=1", ["optim.weight_deca", "did you mean weight_decay?"]),
        ("stepss=1", ["stepss", "did you mean steps?"]),
        ("model.hidden=64", ["model.hidden: there is no such field", "hidden_size"]),
        ("data.sources.1.weigth=1", ["data.sources.1.weigth", "did you mean weight?"]),
        ("evaluation.tasks.0.split=[a]", ["evaluation.tasks.0.split", "did you mean splits?"]),
        ("evaluation.tasks.0.kind=classify", ["evaluation.tasks.0", "classify", "'retrieval', 'zeroshot'"]),
        # wrong types and values out of range: the value, and what would do
        ("steps=soon", ["steps", "valid integer", "'soon'"]),
        ("steps=0", ["steps: Input should be greater than 0 (got 0)"]),
        ("steps=10.5", ["steps", "valid integer", "10.5"]),
        ("seed=-1", ["seed", "greater than or equal to 0", "-1"]),
        ("optim.lr=0", ["optim.lr", "greater than 0"]),
        ("optim.lr=.nan", ["optim.lr", "finite number", "nan"]),
        ("optim.betas=[0.9]", ["optim.betas.1"]),
        ("optim.betas=[0.9, 1.0]", ["optim.betas.1", "less than 1"]),
        ("optim.schedule.kind=linear", ["optim.schedule.kind", "'cosine' or 'constant'", "'linear'"]),
        ("optim.schedule.final_scale=2", ["optim.schedule.final_scale", "less than or equal to 1"]),
        ("engine.precision=fp16", ["engine.precision", "'fp32' or 'bf16'", "'fp16'"]),
        ("loss.repeats=maybe", ["loss.repeats", "'positive', 'exclude' or 'negative'"]),
        ("data.sources=[]", ["data.sources", "at least 1"]),
        ('optim.rules=[{pattern: "("}]', ["optim.rules.0.pattern", "not a regular expression", "'('"]),
        ("model.preset=huge", ["model: there is no preset 'huge'; there are 0.4b"]),
        ("model.num_heads=5", ["model", "hidden_size 32 is not a multiple of num_heads 5", "choose one of [1, 2, 4"]),
        ("model=null", ["model"]),
        ("folder=", ["folder", "path"]),
        # fields that do not fit each other
        ("data.image_size=48", ["data.image_size is 48", "model.image_size is 32"]),
        ("optim.schedule.warmup_steps=100", ["optim.schedule.warmup_steps 100 must be less than steps 100"]),
        ("optim.layer_decay=0", ["optim.layer_decay", "greater than 0"]),
        ("optim.layer_decay=1.5", ["optim.layer_decay", "less than or equal to 1"]),
        ("lora.rang=4", ["lora.rang: there is no such field; did you mean rank?"]),
        ("lora.rank=0", ["lora.rank", "greater than 0"]),
        ('lora.pattern="("', ["lora.pattern", "not a regular expression"]),
        ("lora.dropout=0.1", ["lora.dropout: a step's second pass must repeat its first", "model.drop_path", "0.1"]),
        ("lora={}", ["lora adapts weights that exist: set init_from (or leave lora out)"]),
        ("loss={unimodal_weight: 0, vl_weight: 0}", ["loss.unimodal_weight and loss.vl_weight are both 0"]),
    ],
)
def test_a_wrong_field_is_told_with_its_value_and_a_remedy(recipe: Path, override: str, words: list[str]) -> None:
    message = told(recipe, override)
    assert str(recipe) in message and "1 wrong field" in message
    for word in words:
        assert word in message, message


def test_all_wrong_fields_are_told_at_once(recipe: Path) -> None:
    message = told(recipe, "steps=0", "optim.lr=-1", "model.hidden=3")
    assert "3 wrong fields" in message and len(message.splitlines()) == 4


def test_a_missing_field_says_what_belongs_there(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in TREE.items() if key != "global_batch"}))
    assert "global_batch: must be given: pairs an optimizer step, over all ranks" in told(path)
    path.write_text(yaml.safe_dump({**TREE, "data": {}}))
    assert "data.sources: must be given" in told(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such recipe"), ("a: [1", "is not YAML"), ("- a\n- b", "mapping of fields, not list"), ("", "mapping")],
)
def test_a_file_that_is_no_recipe_is_told(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    message = told(path)
    assert words in message and str(path) in message


def test_overrides_reach_every_kind_of_field(recipe: Path) -> None:
    config = load_config(
        recipe,
        [
            *("optim.lr=1e-4", "optim.betas=[0.8, 0.99]", "optim.schedule.kind=constant", "steps=2e2"),
            *("data.sources.1.path=data/c", "data.sources.0.weight=2", "data.sources.1.weight=1"),
            *("data.languages={en: 1}", "evaluation.tasks=[]", "model.hidden_size=64", "log.wandb_project=null"),
            *("optim.rules=[{pattern: text, freeze: true}]", "engine.threads=3", "folder=runs/2024"),
        ],
    )
    assert config.optim.lr == 1e-4 and config.optim.betas == (0.8, 0.99) and config.steps == 200
    assert config.optim.schedule.kind == "constant"
    assert [str(source.path) for source in config.data.sources] == ["data/a", "data/c"]
    assert config.data.languages == {"en": 1.0} and config.evaluation.tasks == []
    assert config.model.hidden_size == 64 and config.model.num_layers == 2
    assert config.optim.rules[0].freeze and config.engine.threads == 3 and config.folder == Path("runs/2024")
    assert load_config(recipe).optim.lr == 1e-3  # the file is as it was


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr", "written field.name=value"),
        ("=3", "written field.name=value"),
        ("steps.lr=3", "'steps' is a value"),
        ("data.sources.2.path=x", "'2' is not an item of a list of 2; count from 0"),
        ("data.sources.x.path=x", "'x' is not an item"),
        ("optim.betas=[0.9, 0.9", "is not YAML"),
    ],
)
def test_a_wrong_override_is_told(recipe: Path, override: str, words: str) -> None:
    message = told(recipe, override)
    assert words in message and override in message


def test_a_resolved_configuration_reads_back_the_same(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["optim.rules=[{pattern: '\\.B\\.', lr_scale: 0.5}]", "data.languages={zh: 1, en: 2}"])
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml())
    again = load_config(path)
    assert again == config and list(again.data.languages) == ["zh", "en"]
    assert again.to_yaml() == config.to_yaml()


def test_the_data_block_takes_the_models_picture_size(recipe: Path) -> None:
    assert load_config(recipe, ["model.image_size=48"]).data.image_size == 48


def test_a_preset_is_only_a_starting_point(recipe: Path) -> None:
    config = load_config(recipe, ["model={preset: tiny, num_layers: 3}"])
    assert config.model == M2EncoderConfig.preset("tiny", num_layers=3)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [(3, "use 6 or 9"), (16, "use 16"), (5, "does not divide over 5 data-parallel ranks; use 5 or 10")],
)
def test_a_batch_that_does_not_divide_is_told(recipe: Path, ranks: int, words: str) -> None:
    config = load_config(recipe)
    assert config.batch_shape(4) == (2, 1)
    with pytest.raises(ValueError, match=f"global_batch 8 .*{words}"):
        config.batch_shape(ranks)


def test_checkpoints_and_evaluations_are_due_at_their_steps_and_at_the_end(recipe: Path) -> None:
    config = load_config(recipe, ["checkpoint.every=30", "evaluation.every=40"])
    assert [n for n in range(1, 101) if config.checkpoint_due(n)] == [30, 60, 90, 100]
    assert [n for n in range(1, 101) if config.evaluation_due(n)] == [40, 80, 100]
    config = load_config(recipe, ["checkpoint.every=0", "evaluation.every=0"])
    assert [n for n in range(1, 101) if config.checkpoint_due(n)] == [100]
    assert [n for n in range(1, 101) if config.evaluation_due(n)] == [100]
    assert not load_config(recipe, ["evaluation.tasks=[]"]).evaluation_due(100)


# -- files of ds_configs/ ----------------------------------------------------------------------------------------------


def mesh(tensor: int = 1, data: int = 1, pipeline: int = 1) -> Mesh:
    return Mesh.imagined(Layout(tensor, data, pipeline))


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda file: file.stem)
def test_every_deepspeed_file_loads(recipe: Path, file: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = deepspeed_config(load_config(recipe, [f"engine.deepspeed={file}", "engine.precision=bf16"]), mesh())
    assert zero_stage(settings) == int(file.stem.removeprefix("zero")[0])
    assert DeepSpeedConfig(settings).zero_optimization_stage == zero_stage(settings)
    assert ("offload_optimizer" in settings["zero_optimization"]) == ("offload" in file.stem)


RECIPES = [p for p in sorted((ROOT / "ds_configs/recipes").glob("*.yaml")) if "model" in yaml.safe_load(p.read_text())]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_loads(file: Path) -> None:
    config = load_config(file)
    assert isinstance(config, RunConfig)
    assert (ROOT / config.engine.deepspeed).is_file()
    assert file.read_text().startswith("#"), "a recipe says what it is for"


def command_lines(file: Path) -> list[tuple[int, list[str]]]:
    """(GPUs, overrides) of the launcher commands in a recipe's heading."""
    found, gpus = [], 0
    for line in file.read_text().splitlines():
        if match := re.match(r"# (\d+) GPUs?\b.*:$", line):
            gpus = int(match[1])
        elif match := re.match(
            rf"#   deepspeed (?:--num_gpus {gpus}|--hostfile hosts) --module m2_ds.train (.*)", line
        ):
            option, recipe, *overrides = match[1].split()
            assert (option, ROOT / recipe) == ("--config", file)
            found.append((gpus, overrides))
    return found


@pytest.mark.parametrize("preset", ["0.4b", "1b", "10b"])
def test_the_released_sizes_have_commands_that_fit_their_gpus(preset: str) -> None:
    file = ROOT / f"ds_configs/recipes/{preset}.yaml"
    commands = command_lines(file)
    assert [gpus for gpus, _ in commands] == [1, 8, 64, 256]
    parameters = sum(math.prod(shape) for shape in canonical_shapes(M2EncoderConfig.preset(preset)).values())
    for gpus, overrides in commands:
        config = load_config(file, overrides)
        layout = Layout.of(config.parallel, gpus)
        settings = deepspeed_config(config, Mesh.imagined(layout))
        config.batch_shape(layout.data)
        nodes = [f"node {d * layout.tensor // 8}" for d in range(layout.data)]
        contrast_groups(layout.data, config.parallel.contrast_group, nodes)
        share = parameters / layout.tensor / layout.pipeline
        offloaded = "offload_optimizer" in settings["zero_optimization"]
        state = share * (0 if offloaded else 4 + 12 / layout.data)  # bytes: bf16 weights and gradients; fp32 AdamW
        assert state < 60e9, f"{state / 1e9:.0f} GB a GPU, and activations come on top"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "must hold"),
        ("{}", "the stage found there is None"),
        ('{"zero_optimisation": {"stage": 2}}', "the stage found there is None"),
        ('{"zero_optimization": {"stage": 4}}', "the stage found there is 4"),
        ('{"zero_optimization": {"stage": "2"}}', "the stage found there is '2'"),
        ('{"zero_optimization": 2}', "the stage found there is None"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' is given twice"),
        *(
            (json.dumps({"zero_optimization": {"stage": 1}, key: 1}), f"sets '{key}'; set {ours} in the recipe instead")
            for key, ours in [
                ("train_batch_size", "global_batch"),
                ("train_micro_batch_size_per_gpu", "micro_batch"),
                ("gradient_accumulation_steps", "micro_batch"),
                ("gradient_clipping", "optim.grad_clip"),
                ("optimizer", "optim"),
                ("scheduler", "optim.schedule"),
                ("bf16", "engine.precision"),
                ("bfloat16", "engine.precision"),
                ("fp16", "engine.precision"),
                ("amp", "engine.precision"),
            ]
        ),
    ],
)
def test_a_wrong_deepspeed_file_is_told(recipe: Path, tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="ds.json") as caught:
        deepspeed_config(load_config(recipe, [f"engine.deepspeed={path}"]), mesh())
    assert words in str(caught.value)


def test_settings_that_do_not_go_together_are_told(recipe: Path) -> None:
    zero1 = ROOT / "ds_configs" / "zero1.json"
    for overrides, words in [
        (["optim.kind=muon", f"engine.deepspeed={zero1}"], "ZeRO stage 1 .* set engine.deepspeed to a file of stage 0"),
        (
            [
                "engine.kept_graphs=2",
                "engine.reduce_once=false",
                "micro_batch=1",
                f"engine.deepspeed={zero1.parent}/zero3.json",
            ],
            "Set kept_graphs: 1 or reduce_once: true",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            deepspeed_config(load_config(recipe, overrides), mesh())
    for override, words in [
        ("loss.form=sigmoid", "the sigmoid loss needs the bias"),
        ("model.logit_bias=true", "the sigmoid loss needs the bias"),
        ("loss={form: sigmoid, label_smoothing: 0.1}", "label_smoothing belongs to form softmax"),
        ("init_pictures=10", "needs model.stem conv"),
        ("parallel.contrast_group={size: 2, nodes: 1}", "not both"),
        ("parallel.tensor_parallel_size=3", r"3 does not divide model.num_heads 4; use one of \[1, 2\]"),
        ("parallel.pipeline_parallel_size=4", "4 is more than the 3 layers; every stage needs one"),
        ("parallel={pipeline_parallel_size: 2, pipeline_layers: [2, 2]}", r"\[2, 2\] hold 4 layers; the model has 3"),
        ("parallel={tensor_parallel_size: 2, contrast_group: {size: 1}, sequence_parallel: 3}", "sequence_parallel"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_config(recipe, [override])
    for overrides, words in [
        (["loss.vl_weight=0", "parallel.pipeline_parallel_size=2"], "stages behind the backbone would have nothing"),
        (["optim.kind=muon", "parallel.tensor_parallel_size=2"], "set optim.kind: adamw"),
        (["lora={}", "init_from=x", "optim.kind=muon"], "lora trains by AdamW: set optim.kind: adamw"),
        (["lora={}", "init_from=x", "parallel.tensor_parallel_size=2"], r"lora needs whole layers.*\(2 x 1\)"),
        (["lora={}", "init_from=x", "parallel.pipeline_parallel_size=3"], r"\(1 x 3\).*DeepSpeed file of ZeRO stage 3"),
        (["lora={}", "init_from=x", "engine={fp8: true, precision: bf16}", "micro_batch=16"], "no layers in fp8"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_config(recipe, overrides)
    for sizes, stage, words in [
        ((2, 1, 1), 0, "a wrong gradient norm. Set engine.deepspeed to a file of stage 1"),
        ((1, 1, 2), 0, "clip wrongly without ZeRO. Set engine.deepspeed to a file of stage 1"),
        ((1, 2, 2), 2, "cannot partition gradients. Set engine.deepspeed to a file of stage 1"),
        ((2, 2, 2), 3, "cannot partition gradients"),
    ]:
        config = load_config(recipe, [f"engine.deepspeed={zero1.parent}/zero{stage}.json"])
        with pytest.raises(ValueError, match=words):
            deepspeed_config(config, mesh(*sizes))
    with pytest.raises(
        ValueError, match=r"micro_batch 3 does not divide the 8 pairs of each of 1 ranks; use one of \[1, 2, 4, 8\]"
    ):
        load_config(recipe, ["micro_batch=3"]).batch_shape(1)
    assert load_config(recipe, ["micro_batch=2"]).batch_shape(2) == (2, 2)


@pytest.mark.parametrize(
    ("balance", "preset", "stages", "sizes"),
    [
        ("arithmetic", "10b", 4, [6, 6, 6, 6]),
        ("memory", "0.4b", 2, [2, 10]),  # the token table is a third of the model
        ("memory", "10b", 2, [11, 13]),
    ],
)
def test_stages_are_balanced_by_what_is_asked(
    recipe: Path, balance: str, preset: str, stages: int, sizes: list[int]
) -> None:
    from m2_ds.engine.pipeline import stage_sizes

    overrides = [f"model={{preset: {preset}}}", f"parallel.pipeline_balance={balance}"]
    assert stage_sizes(load_config(recipe, overrides), stages) == sizes
    asked = [*overrides, f"parallel.pipeline_parallel_size={stages}"]
    by_hand = [1] * (stages - 1) + [sum(sizes) - stages + 1]
    assert stage_sizes(load_config(recipe, [*asked, f"parallel.pipeline_layers={by_hand}"]), stages) == by_hand
