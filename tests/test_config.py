"""Settings: what loads, what is refused, and that the message helps."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cmim.command_line import CommandLine, parser_of
from cmim.config import (
    _fields,
    _is_choice,
    _load,
    check_background,
    config_from,
    default_config_path,
    dump_config,
    load_config,
)
from cmim.data import load_held_out, load_splits
from cmim.errors import UserError
from cmim.models.build import check_sizes, token_stride
from cmim.settings import Config

SHAPES = default_config_path()
CONFIGS = sorted(SHAPES.parent.glob("*.yaml"))


def refused(*overrides, path=SHAPES):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def write(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_survives_a_dump(path, tmp_path):
    config = load_config(path, ["--data.root", str(tmp_path)])
    assert load_config(write(tmp_path, dump_config(config))) == config
    stated = yaml.safe_load(path.read_text())
    for section, values in stated.items():
        for key, value in values.items():
            loaded = config.model_dump(mode="json")[section][key]
            assert loaded == value


def test_defaults_are_those_of_the_readme():
    config = config_from({"data": {"root": "x"}}, "test")
    assert (config.mask.ratio, config.mask.block, config.mask.fill) == (0.6, 32, "mean")
    assert (config.mim.w_pix, config.mim.w_feat, config.mim.w_sem, config.mim.tau) == (0.5, 0.1, 1, 0.95)
    assert config.mim.views == ["labelled", "weak", "strong"]
    assert (config.data.crop, config.data.labelled, config.method.preset) == (320, None, "cmim")
    assert token_stride(config) == 4


def test_dump_keeps_every_setting(tmp_path):
    config = load_config(
        SHAPES,
        ["--data.labelled", "list.txt", "--data.label_map", "{255: 1}", "--data.classes", "[a, b]", "--method.ohem", "{}",
         "--data.size", "[40, 60]", "--seed", "-3", "--reconstruction.tokens", "encoder", "--train.compile", "true",
         "--data.root", str(tmp_path)],
    )  # fmt: skip
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config
    assert again.data.labelled == Path("list.txt") and again.data.label_map == {255: 1} and again.method.ohem is not None


@given(st.floats(1e-12, 1e12), st.integers(-(2**62), 2**62))
def test_numbers_survive_the_command_line_and_a_dump(lr, seed):
    config = load_config(SHAPES, ["--optimizer.lr", repr(lr), f"--seed={seed}"])
    assert (config.optimizer.lr, config.seed) == (lr, seed)
    assert config_from(yaml.safe_load(dump_config(config)), "dump") == config


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("train.stps", "train.steps"),
        ("trian.steps", "train"),
        ("mask.raito", "mask.ratio"),
        ("data.labeled", "data.labelled"),
        ("steps", "train.steps"),
        ("stps", "train.steps"),
        ("model.lr", "optimizer.lr"),
        ("train.root", "data.root"),
        ("data.shapes.vall", "data.shapes.val"),
        ("method.ohem.treshold", "method.ohem.threshold"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(key, nearest, tmp_path):
    assert refused(f"--{key}", "1") == f"command line: unknown key {key.split('.')[0] if nearest == 'train' else key}" + (
        f"; did you mean {nearest}?"
    )
    values = 1
    for part in reversed(key.split(".")):
        values = {part: values}
    path = write(tmp_path, yaml.safe_dump({"data": {"format": "shapes"}} | values if "data." not in key else values))
    message = refused(path=path)
    assert message.startswith(f"{path}: unknown key ") and message.endswith(f"did you mean {nearest}?")


def test_a_key_like_no_other_gets_no_suggestion():
    assert refused("--train.qqqq", "1") == "command line: unknown key train.qqqq"


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("train.steps", "many", "valid integer, got 'many'"),
        ("train.steps", "3.5", "valid integer, got 3.5"),
        ("train.steps", "true", "valid integer, got True"),
        ("train.steps", "0", "greater than or equal to 1, got 0"),
        ("optimizer.lr", "-1", "greater than 0, got -1"),
        ("optimizer.lr", ".inf", "finite number, got inf"),
        ("optimizer.lr", "fast", "valid number"),
        ("mask.ratio", "1", "less than 1, got 1"),
        ("mask.fill", "pink", "'mean', 'black' or 'learned', got 'pink'"),
        ("mim.views", "[weak, wrong]", "'labelled', 'weak' or 'strong', got 'wrong'"),
        ("mim.views", "weak", "valid list, got 'weak'"),
        ("data.size", "[0, 3]", "greater than or equal to 1, got 0"),
        ("data.scale", "[0.5]", "required"),
        ("data.ignore", "256", "less than or equal to 255"),
        ("data.label_map", "{a: 1}", "valid integer"),
        ("data.shapes.val", "0", "greater than or equal to 1, got 0"),
        ("data", "3", "expected settings of its own, got 3"),
        ("data.labelled", "1.5", "got 1.5, expected: Labelled share of train/ (at most 1), number of labelled images"),
        ("data.labelled", "0", "got 0, expected: Labelled share"),
        ("data.labelled", "true", "got True, expected: Labelled share"),
        ("data.classes", "[a, 3]", "got ['a', 3], expected: Names or number of the classes"),
        ("model.weights", "null", "valid string, got None"),
        ("train.compile", "maybe", "valid boolean"),
    ],
)
def test_an_ill_typed_value_is_named_with_its_key(key, value, said):
    message = refused(f"--{key}", value)
    assert message.startswith(f"command line: {key}: ") and said in message and "\n" not in message


def test_every_setting_of_several_types_says_what_they_stand_for():
    """The description is the error message."""
    choices = {key: field for key, field in _fields(Config).items() if _is_choice(field.annotation)}
    assert set(choices) == {"data.labelled", "data.classes", "data.colours", "data.val", "method.class_weights"}
    assert all(field.description for field in choices.values())


def test_data_labelled_keeps_its_type():
    labelled = [load_config(SHAPES, ["--data.labelled", text]).data.labelled for text in ("1", "1.0", "0.5", "names.txt")]
    assert labelled == [1, 1.0, 0.5, Path("names.txt")]
    assert [type(v) for v in labelled[:2]] == [int, float]


@pytest.mark.parametrize(
    "text, said",
    [
        ("data: [\n", "is not valid YAML"),
        ("a: \x00", "is not valid YAML"),
        ("data: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("- data\n", "expected sections such as 'train:'"),
        ("3", "expected sections such as 'train:'"),
        ("1: 2", "unknown key 1"),
        ("data: {format: shapes, 12: 2}", "unknown key data.12"),
        (b"\xff\xfe\x01", "not a text file"),
        ("[" * 5000, "is not valid YAML"),
        ("train: 4", "train: expected settings of its own, got 4"),
    ],
)
def test_a_broken_file_is_named(text, said, tmp_path):
    path = write(tmp_path, text)
    message = refused(path=path)
    assert str(path) in message and said in message and "\n" not in message


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    assert (
        refused(path=tmp_path / "none.yaml") == f"cannot read the config {tmp_path / 'none.yaml'}: No such file or directory"
    )
    assert "Is a directory" in refused(path=tmp_path)


def test_an_empty_section_keeps_its_defaults(tmp_path):
    path = write(tmp_path, "data:\ntrain:\n  # steps: 5\n")
    assert load_config(path, ["--data.format", "shapes"]).train.steps == Config().train.steps


def test_both_forms_of_an_override_and_the_last_one_counts():
    config = load_config(SHAPES, ["--train.steps=7", "--mask.ratio", "0.25", "--seed", "-4", "--train.steps", "9"])
    assert (config.train.steps, config.mask.ratio, config.seed) == (9, 0.25, -4)
    assert load_config(SHAPES, ["--method.ohem.threshold", "0.6"]).method.ohem.threshold == 0.6
    assert load_config(SHAPES, ["--data.test", "null"]).data.test is None


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["--train.steps"], "--train.steps: a value is missing"),
        (["--train.steps", "--seed", "1"], "--train.steps: a value is missing"),
        (["train.steps", "3"], "unexpected argument 'train.steps'"),
        (["--train.steps.x", "3"], "--train.steps.x: steps is a value, not a section"),
        (["--data.size", "[1"], "--data.size: '[1' is not a YAML value"),
    ],
)
def test_a_malformed_override_is_named(overrides, said):
    assert said in refused(*overrides)


def test_the_command_line_tells_settings_from_options():
    parser = CommandLine("cmim.test", "doc")
    parser.add_argument("config", nargs="?")
    parser.add_argument("--output")
    parser.add_argument("--resume", action="store_true")
    given, overrides = parser.parse(
        ["--seed", "-1", "a.yaml", "--output=runs/a.b", "--train.steps=3", "--resume", "--mim.ramp", "-0.5"]
    )
    assert (given.config, given.output, given.resume) == ("a.yaml", "runs/a.b", True)
    assert overrides == ["--seed", "-1", "--train.steps=3", "--mim.ramp", "-0.5"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--outptu", "x"], "unknown option --outptu; did you mean --output?"),
        (["--steps", "3"], "unknown key steps; did you mean train.steps?"),
        (["a.yaml", "b.yaml"], "unexpected argument 'b.yaml'"),
        (["--output"], "--output: expected one argument"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, said):
    parser = CommandLine("cmim.test", "doc")
    parser.add_argument("config", nargs="?")
    parser.add_argument("--output")
    with pytest.raises(UserError, match="--help") as caught:
        parser.parse(arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["--data.crop", "72"], "data.crop is 72, which is not a multiple of mask.block 16; try 64"),
        (["--data.crop", "8"], "data.crop is 8, which is not a multiple of mask.block 16; try 16"),
        (["--mask.ratio", "0.01"], "mask.ratio 0.01 of 16 blocks hides nothing"),
        (["--mask.ratio", "0.99"], "mask.ratio 0.99 of 16 blocks hides everything"),
        (["--train.unlabelled_batch", "3"], "train.unlabelled_batch is 3: CutMix pairs images, so it must be even"),
        (["--reconstruction.kernel_size", "4"], "reconstruction.kernel_size is 4, expected an odd number"),
        (
            ["--reconstruction.decoder", "attention", "--reconstruction.width", "40"],
            "multiple of 4 x reconstruction.num_heads",
        ),
        (["--optimizer.layer_decay", "0.7"], "model.arch deeplabv3plus has no transformer blocks; leave it out"),
        (
            ["--optimizer.layer_decay", "0.7", "--model.arch", "dpt", "--model.freeze_encoder", "true"],
            "optimizer.layer_decay is 0.7, but model.freeze_encoder trains no block",
        ),
        (["--mim.views", "[]"], "mim.views is empty"),
        (["--method.preset", "semantic", "--mim.views", "[]"], "mim.views is empty"),
        (["--mim.views", "[weak, weak]"], "mim.views names a view twice"),
        (["--data.scale", "[2, 1]"], "data.scale: the lower bound 2.0 is above the upper bound 1.0"),
        (["--data.format", "folder"], "data.root is missing"),
    ],
)
def test_settings_that_contradict_each_other(overrides, said):
    assert said in refused(*overrides)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["--mask.block", "2"], "mask.block is 2, which is not a multiple of the token stride 4"),
        (["--mask.block", "8", "--reconstruction.tokens", "encoder"], "not a multiple of the token stride 16"),
        (["--mask.block", "8", "--centroids.features", "encoder"], "not a multiple of the token stride 16"),
        (["--model.arch", "dpt", "--model.encoder", "test_vit", "--data.crop", "72"], "takes multiples of 16; try 64"),
    ],
)
def test_settings_that_contradict_the_network(overrides, said):
    config = load_config(SHAPES, [*overrides, "--mask.ratio", "0.5"] + (["--mask.block", "8"] if "dpt" in overrides else []))
    with pytest.raises(UserError, match=said):
        check_sizes(config)


@pytest.mark.parametrize(
    "overrides",
    [
        ["--method.preset", "unimatch", "--data.crop", "72", "--mask.ratio", "0.01"],
        ["--method.preset", "supervised", "--train.unlabelled_batch", "3"],
        ["--method.preset", "semantic", "--reconstruction.kernel_size", "4"],
        ["--method.cutmix", "0", "--train.unlabelled_batch", "3"],
        ["--reconstruction.decoder", "attention", "--reconstruction.width", "64"],
        ["--mask.ratio", "0.04"],
        ["--mask.ratio", "0.96"],
    ],
)
def test_what_a_method_does_not_use_is_not_checked(overrides):
    load_config(SHAPES, overrides)


def test_a_name_that_looks_like_a_number_is_a_name(tmp_path):
    words = [
        "--data.format",
        "voc",
        "--data.root",
        "2012",
        "--data.split",
        "1_16",
        "--data.test",
        "7",
        "--data.val",
        "'7'",
        "--data.labelled",
        "1_8",
    ]
    data = load_config(SHAPES, words).data
    assert (data.root, data.split, data.test, data.val) == (Path("2012"), Path("1_16"), "7", "7")
    assert data.labelled == Path("1_8")
    assert load_config(SHAPES, ["--data.split", "null", "--data.test", "null"]).data.test is None
    said = refused(path=write(tmp_path, "data: {format: voc, root: x, split: 92}"))
    assert said.endswith("data.split: expected text, got 92; write it in quotes")


NAMES = [
    "run #2",
    "@at",
    "*star",
    "!bang",
    "&amp",
    "null",
    "yes",
    "~",
    "{a}",
    "[b",
    "12:30",
    "2024-01-01",
    "a: b",
    "- x",
    "%",
    "`",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_on_the_command_line_are_taken_as_they_stand(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    (tmp_path / "run").mkdir()
    for form in ([f"--data.root={name}"], ["--data.root", name]):
        assert load_config(SHAPES, form).data.root == Path(name)
    for key in ("data.split", "data.labelled", "model.init_from", "model.weights", "data.val", "data.test"):
        section, last = key.split(".")
        if key == "data.split":  # shapes has no files
            continue
        assert str(getattr(getattr(load_config(SHAPES, [f"--{key}={name}"]), section), last)) == name
    quoted = load_config(SHAPES, ["--data.root", "'a b'", "--data.val", '"c"']).data
    assert (quoted.root, quoted.val) == (Path("a b"), "c")


def test_numbers_are_those_that_people_read():
    numbers = ["7", "-3", "1_000", "0.5", "1e-3", "1.5e+2", ".5", "2.", "-.inf"]
    assert [_load(text) for text in numbers] == [7, -3, 1000, 0.5, 1e-3, 150, 0.5, 2, float("-inf")]
    assert [_load(text) for text in ("010", "12:30", "0x1F", "2024-01-01")] == ["010", "12:30", "0x1F", "2024-01-01"]
    assert "valid integer, got '1:30'" in refused("--train.steps", "1:30")


def test_null_is_none_where_no_such_file_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_config(SHAPES, ["--data.root", "null", "--data.test", "null"]).data
    assert (data.root, data.test) == (None, None)
    assert "data.ignore: " in refused("--data.ignore", "null")
    assert refused("--data.root", "").startswith("--data.root is empty; give a value")


@pytest.mark.parametrize("name", ["yes", "no", "on", "off", "y", "N"])
def test_yes_and_no_are_names_of_classes(name, tmp_path):
    assert load_config(SHAPES, ["--data.classes", f"[{name}, other]"]).data.classes == [name, "other"]
    path = write(tmp_path, f"data: {{format: shapes, classes: [{name}, other]}}\ntrain: {{compile: true}}\n")
    config = load_config(path)
    assert config.data.classes == [name, "other"] and config.train.compile is True
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    "key, value", [("mean", [123.675, 116.28, 103.53]), ("std", [58.4, 57.1, 57.4]), ("mean", [-1, 0, 0])]
)
def test_colours_are_on_the_scale_from_0_to_1(key, value):
    assert refused(f"--data.{key}={value}").startswith(f"command line: data.{key}: ")


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("train:\n  steps: 3\n  steps: 4\n", "steps", 2),
        ("data: {crop: 32}\ntrain: {steps: 3}\ndata: {format: shapes}\n", "data", 1),
        ("data: {label_map: {1: 0, 255: 1, 1: 2}}\n", "1", 1),
    ],
)
def test_a_key_that_stands_twice(text, key, line, tmp_path):
    said = refused(path=write(tmp_path, text))
    assert f"own.yaml is not valid YAML: {key} of line {line} is repeated here; remove one of the two" in said
    assert "--data.label_map: '{1: 0, 1: 2}' is not a YAML value" in refused("--data.label_map", "{1: 0, 1: 2}")


def test_merged_keys_may_be_set_again(tmp_path):
    path = write(
        tmp_path,
        "data: {format: shapes}\ntrain: &t {steps: 3, log_every: 2}\nevaluation: {<<: {batch: 2, flip: true}, batch: 3}\n",
    )
    assert load_config(path).evaluation.batch == 3 and load_config(path).evaluation.flip


@pytest.mark.parametrize(
    "key", ["train.steps", "data.size", "data.crop", "seed", "data.labelled", "data.root", "method.preset"]
)
def test_an_empty_value_is_no_null(key):
    for form in ([f"--{key}", ""], [f"--{key}= "]):
        assert f"--{key} is empty; give a value" in refused(*form)


@pytest.mark.parametrize(
    "key", ["optimizer.lr", "method.tau", "evaluation.scales", "data.workers", "seed", "data.background"]
)
def test_true_is_no_number(key):
    value = "[true]" if key == "evaluation.scales" else "true"
    assert f"{key}: input should be a valid" in refused(f"--{key}", value)


def test_a_value_that_unfolds_is_said_in_short(tmp_path):
    lines = ["  - &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"  - &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefg", "bcdefgh", strict=True)]
    said = refused(path=write(tmp_path, "\n".join(["data:", "  classes:", *lines])))
    assert "data.classes: got" in said and len(said) < 2000


@pytest.mark.parametrize(("key", "value"), [("data.size", "[10000000, 10000000]"), ("data.crop", "100000000")])
def test_an_image_beyond_all_memory(key, value):
    assert f"{key} is {value}, too large for an image" in refused(f"--{key}", value, "--mask.block", "16")


def test_a_background_that_is_no_class():
    check_background(load_config(SHAPES, ["--data.background", "4"]), 5)
    with pytest.raises(UserError, match=r"data.background is 5, but the classes are 0 to 4; give one of them, or null"):
        check_background(load_config(SHAPES, ["--data.background", "5"]), 5)


@pytest.mark.parametrize("overrides", [["--data.root", "x"], ["--data.classes", "3"], ["--data.labelled", "0.5"]])
def test_a_setting_of_the_data_that_would_count_for_nothing(overrides):
    settings = load_config(SHAPES, overrides).data
    for load in (load_splits, lambda settings: load_held_out(settings, "val")):
        with pytest.raises(UserError, match=f"{overrides[0][2:]} is given, but data.format shapes does not use"):
            load(settings)


@pytest.mark.parametrize("words", [["", "--output", "x"], ["--output", ""], ["--output="]])
def test_an_argument_that_is_empty(words):
    with pytest.raises(
        UserError, match=r"the argument (config|output) is empty; give a value; see python -m cmim.train --help"
    ):
        parser_of("train", "").parse(words)
