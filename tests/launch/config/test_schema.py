from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel, ConfigDict

from dataprep.prepare import PrepareConfig
from launch.config.load import load_config, load_settings
from launch.config.model_sections import PreviewConfig
from launch.config.recipes import recipe_names, recipe_path
from launch.config.run_sections import EvalConfig
from launch.config.schema import Config, ConfigError, digest, to_yaml
from launch.training.checks import check_models
from tim import TransitionTransformer

GOOD = """\
corpus: corpus
network:
  params: {patch_size: 2, depth: 2, hidden_size: 32, num_heads: 2}
train:
  steps: 100
  lr: 1e-4
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def test_what_follows_from_the_codec_is_filled_in(good: Path) -> None:
    config = load_config(good)
    assert (config.plan.stride, config.network.params.in_channels) == (2, 3)
    assert config.train.lr == 1e-4
    assert [source.path for source in config.corpus] == ["corpus"]


def test_overrides_win_over_the_file(good: Path) -> None:
    config = load_config(
        good, overrides=["train.steps=7", "plan.flip=0.5", "train.betas=[0.8, 0.9]", "corpus=[{path: a, name: x}, b]", "run_dir=2024"]
    )
    assert (config.train.steps, config.plan.flip, config.train.betas) == (7, 0.5, (0.8, 0.9))
    assert [(source.name, str(source.path)) for source in config.corpus] == [("x", "a"), (None, "b")]
    assert config.run_dir == Path("2024")


def test_the_resolved_config_reads_back_as_the_same(good: Path, tmp_path: Path) -> None:
    config = load_config(good, overrides=["plan.max_pixels=65536", "objective.shift=null"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "resolved.yaml")
    assert again == config
    assert digest(again) == digest(config) != digest(load_config(good))


IN_THE_FILE = {
    "typo in a section": ("  stpes: 100", "7: train.stpes: unknown key; did you mean train.steps?"),
    "key of another section": ("max_tokns: 5", "7: max_tokns: unknown key; did you mean plan.max_tokens or plan.schedule.max_tokens or"),
    "no such section": ("xyzzy: 5", "7: xyzzy: unknown key; valid keys here: corpus, run_dir,"),
    "text for a number": ("  warmup: many", "7: train.warmup: input should be a valid integer, got 'many'"),
    "number for a text": ("condition: 7", "7: condition: input should be 'text' or 'class', got 7"),
    "section for a number": ("  clip: {a: 1}", "7: train.clip: input should be a valid number, got {'a': 1}"),
    "number for a section": ("plan: 7", "7: plan: input should be an object, got 7"),
    "out of range": ("  warmup: -1", "7: train.warmup: input should be greater than or equal to 0, got -1"),
    "not one of": ("  zero: 4", "7: train.zero: input should be 0, 1, 2 or 3, got 4"),
    "given twice": ("  steps: 4", "7: train.steps: given twice; first at FILE:5"),
    "not YAML": ("  a: [1", "not valid YAML"),
    "warm-up longer than the run": ("  warmup: 101", "7: train.warmup: 101 warm-up steps exceed the 100 steps of the run"),
    "stride of another patch size": ("plan: {stride: 3}", "7: plan.stride: got 3, but it must be 2"),
    "images larger than packs": ("plan: {max_tokens: 99, tokens_per_pack: 9}", "7: plan.max_tokens: plan.max_tokens 99 is more than"),
    "shares above 1": ("objective: {diffusion_share: 0.7, consistency_share: 0.7}", "7: objective.consistency_share: diffusion_share and"),
}


@pytest.mark.parametrize(("line", "message"), IN_THE_FILE.values(), ids=IN_THE_FILE)
def test_mistakes_in_a_file_name_key_file_and_line(good: Path, line: str, message: str) -> None:
    good.write_text(GOOD + line + "\n")
    with pytest.raises(ConfigError) as error:
        load_config(good)
    text = str(error.value)
    assert text.startswith(f"{good}:")
    assert message.replace("FILE", str(good)) in text
    assert "\n" not in text


def test_a_typo_is_blamed_before_the_key_that_it_makes_missing(good: Path) -> None:
    good.write_text(GOOD.replace("hidden_size", "hiden_size"))
    with pytest.raises(ConfigError, match=r":3: network\.params\.hiden_size: unknown key; did you mean network\.params\.hidden_size\?"):
        load_config(good)


ON_THE_COMMAND_LINE = {
    "train.stpes=3": "command line: train.stpes: unknown key; did you mean train.steps?",
    "steps=3": "command line: steps: unknown key; did you mean train.steps or sampling.steps or preview.steps or eval.steps?",
    "train.steps=0": "command line: train.steps: input should be greater than or equal to 1, got 0",
    "train.steps=soon": "command line: train.steps: input should be a valid integer, got 'soon'",
    "train.steps": "command line: 'train.steps' is not of the form key=value",
    "train.steps.x=1": "command line: train.steps.x: train.steps is not a section here (FILE:5)",
    "train={lr: 1}": "command line: train.steps: missing",
    "plan.stride=16": "command line: plan.stride: got 16, but it must be 2",
    "plan.schedule=[{step: 5, diffusion_share: 0.95}]": "command line: plan.schedule.0: from step 5 on diffusion_share 0.95 and",
    "network.params.num_heads=3": "command line: network.params.num_heads: hidden_size 32 over 3 heads",
    "network.params.in_channels=4": "command line: network.params.in_channels: got 4, but codec pixel has 3 channels",
    "objective.transport=cosine": "objective.transport: input should be 'ot_fm', 'trigflow', 'vp', 've' or 'edm', got 'cosine'",
    "objective.sigma_d=1": "command line: objective.sigma_d: transport ot_fm has no such setting; leave it out",
    "objective={transport: ve, time_std: 1}": "command line: objective.time_std: transport ve has no such setting; leave it out",
    "objective={transport: edm, shift: 256}": "command line: objective.shift: transport edm has a fixed noise range",
    "objective={guidance: {interval: [0.8, 0.2]}}": "objective.guidance.interval: [0.8, 0.2] is empty: its start is after its end",
    "sampling.interval=[0.8, 0.2]": "command line: sampling.interval: [0.8, 0.2] is empty: its start is after its end",
    "objective={guidance: {w: 1}}": "command line: objective.guidance.w: unknown key",
    "objective={alignment: {kind: radio, path: x}}": "command line: objective.alignment: needs a projection in the network",
    "network.params.z_dim=8": "command line: network.params.z_dim: got 8, but there is no objective.alignment to train the projection",
    "run_dir=[": "command line: run_dir: '[' is not a YAML value",
}


@pytest.mark.parametrize(("override", "message"), ON_THE_COMMAND_LINE.items())
def test_mistakes_on_the_command_line(good: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(good, overrides=[override])
    assert message.replace("FILE", str(good)) in str(error.value)
    assert "\n" not in str(error.value)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothere\.yaml: no such file"):
        load_config(tmp_path / "nothere.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="demoo: neither a file nor a recipe"):
        load_config("demoo")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match=r"list\.yaml:1: a configuration is a mapping"):
        load_config(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match=r"command line: network: missing"):
        load_config(None, overrides=["train.steps=1"])


def test_a_recipe_is_found_beside_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "runs").mkdir()
    assert load_config("demo").train.optimizer == "muon"
    with pytest.raises(ConfigError, match="runs is a folder"):
        load_config("runs")


def test_every_recipe_is_valid_and_names_no_path() -> None:
    for name in recipe_names():
        config = load_config(name)
        assert config.run_dir is None, name
        assert not config.corpus, name
        assert yaml.safe_load(recipe_path(name).read_text())


@pytest.mark.parametrize(
    ("recipe", "parameters", "stride"),
    [("t2i-xl-1", 873_109_408, 32), ("c2i-b-4-256", 136_173_120, 32), ("c2i-xl-2-256", 672_259_344, 16), ("c2i-xl-1-512", 672_296_224, 32)],
)
def test_the_published_recipes_hold_the_published_networks(recipe: str, parameters: int, stride: int) -> None:
    config = load_config(recipe)
    assert config.plan.stride == stride
    assert config.condition_dropout == 0.1
    assert (config.train.ema, config.train.betas, config.train.weight_decay, config.train.clip) == (0.9999, (0.9, 0.95), 0.01, 1.0)
    with torch.device("meta"):
        network = TransitionTransformer.from_official(config.network.params.model_dump(exclude_none=True))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_a_network_can_be_taken_from_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("network: {recipe: c2i-b-4-256, params: {in_channels: 3, depth: 6}}\ncondition: class\ntrain: {steps: 1}\n")
    config = load_config(path)
    params = config.network.params
    assert (params.hidden_size, params.lora_hidden_size, params.depth, params.num_classes) == (768, 256, 6, 1000)
    assert params.z_dim == 0  # nothing would train the projection
    aligned = load_config(path, overrides=["objective.alignment={kind: radio}"])
    assert aligned.network.params.z_dim == 768
    with pytest.raises(ConfigError, match=r"objective\.alignment\.path: missing; give it in the file"):
        check_models(aligned)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    for override, message in {
        "network.recipe=c2i-b-4-255": r"network\.recipe: 'c2i-b-4-255' is not a recipe; did you mean c2i-b-4-256\?",
        "network.params.in_channels=4": r"in_channels: got 4, but codec pixel has 3 channels; give network\.params",
        "condition=text": r"network\.params\.num_classes: got 1000, but this key is for condition: class, not text",
        "objective.alignment={kind: radio}; network.params.depth=3": r"network\.params\.encoder_depth: got 4, but the network has 3 blocks",
        "network.params=7": r"network\.params: input should be an object",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_config(path, overrides=override.split("; "))


def test_a_class_model_takes_no_captions(good: Path) -> None:
    config = load_config(good, overrides=["condition=class", "network.params.num_classes=7"])
    params = config.network.params
    assert (params.num_classes, params.class_dropout_prob, params.cap_feat_dim, config.condition_dropout) == (7, 0.1, None, 0.1)
    for override, message in {
        "network.params.cap_feat_dim=8": r"cap_feat_dim: got 8, but this key is for condition: text, not class",
        "text.caption_dropout=0.5": "text: condition: class does not use captions",
        "network.params.class_dropout_prob=0": r"objective\.guidance: needs images without a class.*network\.params\.class",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_config(good, overrides=["condition=class", "objective.guidance={}", override])


class Other(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    workers: int = 3


def test_an_exact_derivative_needs_whole_weights(good: Path) -> None:
    assert load_config(good, overrides=["objective.derivative=jvp", "train.zero=2"]).objective.derivative == "jvp"
    with pytest.raises(ConfigError, match=r"objective\.derivative: jvp needs whole weights.*use zero 1 or 2, or finite-difference"):
        load_config(good, overrides=["train.zero=3", "objective.derivative=jvp"])


def test_packs_are_dealt_for_lock_step_where_the_zero_stage_makes_ranks_wait_in_every_pack(good: Path) -> None:
    assert [load_config(good, overrides=[f"train.zero={stage}"]).train.lockstep for stage in (0, 1, 2, 3)] == [False, False, True, True]


def test_guidance_needs_the_empty_caption(good: Path) -> None:
    guidance = load_config(good, overrides=["objective.guidance={}"]).objective.guidance
    assert guidance is not None
    assert (guidance.w_gt, guidance.w_cond, guidance.interval) == (1.0, 0.75, (0.3, 0.8))
    with pytest.raises(ConfigError, match=r"objective\.guidance: needs the empty caption.*give text\.caption_dropout above 0"):
        load_config(good, overrides=["objective.guidance={}", "text.caption_dropout=0"])


def test_a_shift_that_nobody_asked_for_is_left_out_where_there_is_none(good: Path) -> None:
    assert load_config(good, overrides=["objective.transport=ve"]).objective.shift is None
    assert load_config(good, overrides=["objective.transport=trigflow"]).objective.shift == 1024


def test_any_schema_can_be_loaded() -> None:
    assert load_settings(None, overrides=["workers=4"], schema=Other).workers == 4
    with pytest.raises(ConfigError, match="did you mean workers"):
        load_settings(None, overrides=["worker=4"], schema=Other)


def test_config_is_the_default_schema(good: Path) -> None:
    assert isinstance(load_config(good), Config)


def test_what_there_is_to_say_of_sources() -> None:
    overrides = ["sources.web.tags=real, licensed", "sources.art.path=x", "sources.art.tags=[old]", "sources.art.columns.caption=[new,alt]"]
    config = load_settings(None, overrides=[*overrides, "sources.more=list.csv"], schema=PrepareConfig)
    assert {name: (source.path, source.tags) for name, source in config.sources.items()} == {
        "web": (None, ("real", "licensed")),
        "art": ("x", ("old",)),
        "more": ("list.csv", ()),
    }
    assert config.sources["art"].columns.captions == ("new", "alt")
    for override, message in (
        ("sources.web.tagz=a", r"sources\.web\.tagz: unknown key; did you mean sources\.web\.tags\?"),
        ("sources.web.columns.captoin=a", r"did you mean sources\.web\.columns\.caption\?"),
        ("sources.web.tags=[[1]]", r"sources\.web\.tags\.0: input should be a valid string"),
    ):
        with pytest.raises(ConfigError, match=f"^command line: .*{message}"):
            load_settings(None, overrides=[override], schema=PrepareConfig)


def test_previews_are_checked_before_the_training(good: Path) -> None:
    def preview(*overrides: str) -> PreviewConfig:
        return load_config(good, overrides=[*overrides, "plan.max_tokens=70"]).preview

    assert preview().sizes == ()
    assert preview("preview.prompts=[a fox]").sizes == ("16x16",)
    assert preview("preview.prompts=[a fox]", "plan.max_pixels=200").sizes == ("14x14",)
    assert preview("preview={prompts: [a fox], sizes: [8x6, 4x2]}").pixel_sizes == [(6, 8), (2, 4)]
    for override, message in {
        "preview.sizes=[9x8]": r"preview\.sizes\.0: 9x8: sides must be multiples of the stride of 2 pixels; the nearest size is 8x8",
        "preview.sizes=[big]": r"preview\.sizes\.0: 'big' is not WIDTHxHEIGHT",
        "preview.sizes=[8192x8192]": r"preview\.sizes\.0: 8192x8192 exceeds the maximum",
        "preview.prompts=[7]": r"preview\.prompts\.0: got class 7, but the model takes text",
        "preview.steps=[0]": r"preview\.steps",
    }.items():
        with pytest.raises(ConfigError, match=message):
            preview(override)
    with pytest.raises(ConfigError, match=r"preview\.prompts\.1: got 1000, but the model takes classes from 0 to 999"):
        preview("condition=class", "preview.prompts=[0, 1000]")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"metrics": ["fid", "frechett"]}, "eval.metrics: frechett: unknown; choose from fid, "),
        ({"features": ["pixels", "inception"]}, "eval.features: extractor 'inception': expected pixels, inception=FILE"),
        ({"clip": "ViT-L-14"}, "eval.clip: extractor 'ViT-L-14': expected pixels, inception=FILE"),
        ({"metrics": ["clip_score"]}, "eval.clip: missing; eval.metrics: clip_score needs a model"),
        ({"metrics": ["kid"]}, "eval.metrics: kid needs features of inception: give eval.features: [inception=FILE]"),
    ],
)
def test_evaluations_that_cannot_be_made_are_found_at_the_start(section: dict[str, object], expected: str) -> None:
    config = load_config("demo", overrides=["corpus=corpus", "run_dir=run"])
    evaluated = config.model_copy(update={"eval": EvalConfig.model_validate({"every": 350, **section}, strict=False)})
    with pytest.raises(ConfigError, match=re.escape(expected)):
        check_models(evaluated)
