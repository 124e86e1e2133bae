"""Hostile and unusual YAML, JSON and text: one clear error within bounds, and YAML 1.2 where types decide."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videoadapt.config.load import dump_config, load_config, make_config
from videoadapt.config.parse import MAX_DEPTH, MAX_TEXT_BYTES, parse_json, parse_yaml, read_text
from videoadapt.errors import ConfigError, few, one_line, shown


def config_of(tmp_path: Path, text: str, *overrides: str) -> Any:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    """Returns the message of a config that must be refused, as the command prints it."""
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, text, *overrides)
    return one_line(error.value)


# YAML 1.2: the type of the field decides.


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("1440", 1440),
        ("24:00:00", 1440),
        ("08:00:00", 480),
        ("2:30", 3),  # minutes and seconds, rounded up as SLURM does
        ("90:00", 90),
        ("1-00:00:00", 1440),
        ("1-12", 2160),
        ("2-0:30", 2910),
        ("'0:45'", 1),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
    ],
)
def test_a_time_limit_is_a_number_or_a_time_as_sbatch_writes_it(tmp_path: Path, written: str, minutes: int) -> None:
    assert config_of(tmp_path, f"slurm: {{time_minutes: {written}, signal_s: 10}}").slurm.time_minutes == minutes
    assert config_of(tmp_path, "slurm: {signal_s: 10}", f"slurm.time_minutes={written}").slurm.time_minutes == minutes


@pytest.mark.parametrize("written", ["24h", "1:2:3:4", "-5", "1-", ":30", "0", "0:00", "infinite", "1e9999"])
def test_another_time_is_an_error_with_the_field(tmp_path: Path, written: str) -> None:
    assert "slurm.time_minutes: " in refused(tmp_path, "", f"slurm.time_minutes={written}")


@pytest.mark.parametrize(
    "written",
    ["123456", "010", "0o7", "1e5", "no", "yes", "on", "true", "2026-11-26", "12:30:00", "1_000", "=", "[a|h]"],
)
def test_text_stays_text_as_it_was_written(tmp_path: Path, written: str) -> None:
    assert config_of(tmp_path, f"slurm: {{account: {written}}}").slurm.account == written
    assert config_of(tmp_path, "", f"slurm.account={written}").slurm.account == written
    assert config_of(tmp_path, f"run: {{dir: {written}}}").run.dir == Path(written)
    assert config_of(tmp_path, "", f"run.dir={written}").run.dir == Path(written)


def test_an_override_without_brackets_or_quotes_is_text_to_its_end(tmp_path: Path) -> None:
    assert config_of(tmp_path, "", "slurm.comment=fix #12: try").slurm.comment == "fix #12: try"
    assert config_of(tmp_path, "", "slurm.comment=*best &all !").slurm.comment == "*best &all !"
    assert config_of(tmp_path, "", 'slurm.comment="a \\t b"').slurm.comment == "a \t b"
    assert config_of(tmp_path, "", "slurm.comment=[a, b").slurm.comment == "[a, b"


def test_a_list_of_texts_takes_a_bare_word_and_hosts_take_a_list(tmp_path: Path) -> None:
    assert config_of(tmp_path, "", "slurm.setup=module load cuda").slurm.setup == ("module load cuda",)
    assert config_of(tmp_path, "slurm: {setup: [module load cuda, 7]}").slurm.setup == ("module load cuda", "7")
    assert config_of(tmp_path, "slurm: {exclude: [n01, n02]}").slurm.exclude == "n01,n02"
    assert config_of(tmp_path, "", "slurm.exclude=n[01-02],m1").slurm.exclude == "n[01-02],m1"
    assert config_of(tmp_path, "", "slurm.constraint=[a100|h100]").slurm.constraint == "[a100|h100]"


def test_booleans_and_null_are_those_of_the_field(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, "train: {compile: no, clip_grad: ~}\nmodel: {temporal: true, fps: null}\nslurm: {qos: }"
    )
    assert (config.train.compile, config.train.clip_grad, config.model.temporal, config.model.fps) == (
        "off",
        None,
        True,
        None,
    )
    assert config_of(tmp_path, "", "train.compile=true").train.compile == "on"
    assert config.slurm.qos is None
    assert config_of(tmp_path, "slurm: {qos: 'null'}").slurm.qos == "null"
    assert "train.epochs" in refused(tmp_path, "train: {epochs: true}")


def test_merge_keys_of_anchors_fill_what_is_missing() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {x: 5, z: 6}\nc: {<<: [*a, *b], y: 3}\nd: {<<: *a}"
    parsed = parse_yaml(text)
    assert parsed["c"] == {"x": "1", "y": "3", "z": "6"}
    assert parsed["d"] == parsed["a"]


# Paths: `~`, `$NAME`.


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VA_DATA", "/data")
    monkeypatch.delenv("VA_NONE", raising=False)
    return tmp_path / "home"


PATHS = [
    ("~/x", "{home}/x"),
    ("$VA_DATA/x", "/data/x"),
    ("${VA_DATA}/x", "/data/x"),
    ("$HOME/x", "{home}/x"),
    ("${VA_NONE:-~}/x", "{home}/x"),
    ("./~", "~"),
    ("a~", "a~"),
    ("$$VA_DATA/$1", "$VA_DATA/$1"),
]


@pytest.mark.parametrize("field", ["run.dir", "data.root", "data.train.annotations", "data.classes", "train.init"])
@pytest.mark.parametrize(("written", "path"), PATHS)
def test_every_path_of_a_config_or_override_expands_home_and_variables(
    tmp_path: Path, home: Path, field: str, written: str, path: str
) -> None:
    expected = path.format(home=home)
    *sections, key = field.split(".")
    text = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(sections))
    text += f"{'  ' * len(sections)}{key}: '{written}'"
    for config in (config_of(tmp_path, text), config_of(tmp_path, "", f"{field}={written}")):
        found = config
        for name in field.split("."):
            found = getattr(found, name)
        assert Path(found) == Path(expected)
        again = config_of(tmp_path, dump_config(config))  # what a run folder keeps loads to the same
        assert again == config


def test_base_expands_too_and_a_lone_tilde_is_home_behind_an_equals_sign(tmp_path: Path, home: Path) -> None:
    home.mkdir()
    (home / "b.yaml").write_text("run: {seed: 5}")
    assert config_of(tmp_path, "base: ~/b.yaml").run.seed == 5
    assert config_of(tmp_path, "base: $HOME/b.yaml").run.seed == 5
    assert config_of(tmp_path, "", "data.root=~").data.root == home
    assert config_of(tmp_path, "", "data.root=null").data.root is None


def test_an_unknown_variable_or_user_in_a_path_is_an_error_with_a_remedy(tmp_path: Path, home: Path) -> None:
    assert "data.root: environment variable VA_NONE is not set; set it, or pass data.root=..." in refused(
        tmp_path, "data: {root: $VA_NONE/x}"
    )
    assert "write ./~nobody-here/x" in refused(tmp_path, "", "run.dir=~nobody-here/x")


def test_only_paths_expand_a_variable_without_braces(tmp_path: Path, home: Path) -> None:
    config = config_of(tmp_path, "slurm: {setup: ['export A=$VA_DATA', 'b=${VA_DATA}', 'c=$${VA_DATA}', 'kill $$']}")
    assert config.slurm.setup == ("export A=$VA_DATA", "b=/data", "c=${VA_DATA}", "kill $$")
    assert config_of(tmp_path, dump_config(config)) == config


@given(st.text(st.sampled_from("$~{}VA:-x/"), min_size=1, max_size=12))
def test_any_name_with_dollars_and_tildes_survives_a_dump(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    config = make_config({"run": {"dir": name}, "slurm": {"comment": name}, "train": {"init": name}})
    path = tmp_path_factory.getbasetemp() / "dollars.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(path)
    assert (again.run.dir, again.slurm.comment) == (config.run.dir, config.slurm.comment)
    assert os.path.normpath(str(again.train.init)) == os.path.normpath(name)


# Hostile files.

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{','.join(['*' + chr(97 + n)] * 9)}]}}\n" for n in range(8)
)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("a: " + "[" * 50_000, "nested more than 40 levels"),
        ("a: " + "{a: " * 5_000, "nested more than 40 levels"),
        ("- " * 5_000, "nested more than 40 levels"),
        ("a: &a [*a]", "an alias inside of its own value"),
        ("a: &a {b: {c: *a}}", "an alias inside of its own value"),
        (BOMB, "more than 20,000 values"),
        (MERGE_BOMB, "more than 20,000 values"),
        ("model: !!python/object:os.system {}", "a config has no tags"),
        ("model: !!int x", "a config has no tags"),
        ("model: !!timestamp x", "a config has no tags"),
        ("model: !<tag:yaml.org,2002:binary> x", "a config has no tags"),
        ("run: {seed: 1}\nrun: {seed: 2}", "the key 'run' is there twice"),
        ("run: {seed: 1, seed: 2}", "the key 'seed' is there twice"),
        ("? [a]\n: b", "a key is not text"),
        ("a: \0", "not valid YAML"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("%YAML 1." + "9" * 5_000 + "\n--- a", "not valid YAML"),
        ("a: *" + "x" * 100_000, "not valid YAML"),
        ("a: <<\n<<: 3", "<< expects a mapping"),
        ("x" * 300_000, "larger than 262,144 bytes"),
        ('run: {dir: "a\\0b"}', "run.dir: expected text in UTF-8 without NUL"),
        ('run: {dir: "\\uD800"}', "run.dir: expected text in UTF-8 without NUL"),
        ("run: {dir: " + "x" * 300 + "}", "run.dir: expected a path of at most 4095 bytes"),
        ("run: {seed: " + "9" * 5_000 + "}", "run.seed: "),
        ("run: {seed: 18446744073709551616}", "run.seed: "),
        ("run: {seed: -1}", "run.seed: "),
        ("train: {lr: 1e300}", "train.lr: "),
        ("train: {lr: " + "1" * 5_000 + "}", "train.lr: "),
        ("model: {points: [" + "9" * 5_000 + "]}", "model.points: "),
        ("model: {depth: 999999999999}", "model.depth: "),
        ("launch: {shards: 999999999999}", "launch.shards: "),
        ("data: {workers: 999999999}", "data.workers."),
        ("data: {rand_augment: rand-n99999999-inc1}", "data.rand_augment: "),
        ("parallel: {shard: ²/³}", "parallel.shard: "),
        ("parallel: {step_s: 1e12}", "parallel.step_s: "),
        ("".join(f"k{n}: 1\n" for n in range(9_000)), "and 8992 more"),
        ("run: {\x1b[31m: 1}", "not valid YAML"),
    ],
    ids=lambda value: value[:24],
)
def test_a_hostile_config_is_one_short_line_with_its_cause(tmp_path: Path, text: str, cause: str) -> None:
    message = refused(tmp_path, text)
    assert cause in message
    assert "a.yaml" in message or "run.dir" in message or "parallel.shard" in message
    assert len(message) < 1000
    assert message.isprintable()


def test_a_deep_override_is_refused(tmp_path: Path) -> None:
    assert "expected section.key=value" in refused(tmp_path, "", ".".join(["a"] * 100_000) + "=1")
    assert "expected section.key=value" in refused(tmp_path, "", "x" * 100_000)


def test_bases_without_end_are_refused(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml")
    assert "more than 20 files start from each other" in refused(tmp_path, "base: 0.yaml")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/random", "pipe"])
def test_a_pipe_or_a_device_is_refused_and_never_waited_for(tmp_path: Path, device: str) -> None:
    path = tmp_path / "pipe" if device == "pipe" else Path(device)
    if device == "pipe":
        os.mkfifo(path)
    with pytest.raises(ConfigError, match="cannot read this config: not a regular file"):
        load_config(path)


def test_a_file_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="larger than 1,000 bytes"):
        read_text(tmp_path / "sparse", 1000)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5_000, "digits"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("[1,\n2", "line 2 "),
    ],
    ids=lambda value: value[:12],
)
def test_hostile_json_is_a_value_error_of_one_line(text: str, cause: str) -> None:
    with pytest.raises(ValueError, match=cause) as error:
        parse_json(text)
    assert "\n" not in str(error.value)


@given(st.recursive(st.none() | st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x)))
def test_json_is_read_as_yaml_reads_it(value: Any) -> None:
    """JSON is a part of YAML 1.2, but for pairs of surrogates, which PyYAML does not join."""
    text = json.dumps(value)
    if "\\ud" not in text:
        assert parse_yaml(text) == parse_json(text) == value


def test_the_depth_that_a_config_may_have_is_read() -> None:
    inside = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert str(parse_yaml(inside)).replace("'", "") == inside


def test_values_and_messages_are_cut() -> None:
    assert len(shown("x" * 10**6)) < 300
    assert len(shown([["y" * 1000] * 1000] * 1000)) < 300
    assert len(shown(10**3000)) < 300
    long = one_line("field: " + "x" * 10**5 + "; do this")
    assert len(long) < 1000
    assert long.startswith("field: ")
    assert long.endswith("; do this")
    assert one_line("a\nb\x1b[31m\u202e") == "a b\\x1b[31m\\u202e"


def test_a_list_in_a_message_has_its_first_names_and_the_number_of_the_others() -> None:
    assert few([]) == ""
    assert few(["a", 2]) == "a, 2"
    assert few("abcde") == "a, b, c, d, e"
    assert few((f"{n}: 0 then, 1 now" for n in range(4)), 2, "; ") == "0: 0 then, 1 now; 1: 0 then, 1 now and 2 more"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc of Linux")
def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    """Two byte order marks: as text, Python reserves six times the limit for them."""
    path = tmp_path / "marks.txt"
    path.write_bytes("\ufeff\ufeffa\r\nb\r".encode())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 1024**2, before[1]))
    try:
        text = read_text(path, MAX_TEXT_BYTES, "utf-8-sig")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert text == "\ufeffa\nb\n"
