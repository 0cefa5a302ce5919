"""What SECURITY.md promises, one test each."""

from __future__ import annotations

import ast
import contextlib
import copy
import hashlib
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jinja2.exceptions import SecurityError

import shadowc
from shadowc import foreign, native
from shadowc.artifact import MANIFEST, NO_NATIVE, open_artifact, update_report
from shadowc.errors import ArtifactError, ShadowcError
from shadowc.evaluation.report import render, save_section
from shadowc.runtime import program as programs
from shadowc.runtime.config import artifact_config
from shadowc.runtime.loading import load_session
from shadowc.runtime.program import Program
from shadowc.runtime.session import PROGRAMS
from shadowc.targets.onnx import genai_config

MARK = "marked_by_the_artifact"
ATTACK = f"__import__('os').environ.__setitem__('{MARK}', '1')"


@pytest.fixture
def decode(sample):
    return json.loads(sample.files["programs/decode.json"])


def refused(sample, name, content, match):
    """A file with another content, its hashes right, is refused by name."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    sample.put(name, text)
    sample.seal()
    with pytest.raises(ArtifactError, match=match) as found:
        load_session(open_artifact(sample.root))
    assert name.rpartition("/")[2] in str(found.value)


def test_a_sound_one_loads_and_generates(sample):
    model = shadowc.load(sample.root)
    text = model.tokenizer("once", return_tensors="pt")
    assert model.generate(**text, max_new_tokens=4).shape[1] == text["input_ids"].shape[1] + 4


@pytest.mark.parametrize("place", ["input", "keyword", "node", "output"])
def test_names_cannot_bring_code(sample, decode, place):
    """fx writes names into Python text; these would run when the program is bound."""
    if place == "input":
        decode["inputs"][0] = f"x={ATTACK}"
    elif place == "keyword":
        decode["nodes"][0]["kwargs"] = {"map": {f"alpha={ATTACK}, beta": 1}}
    elif place == "node":
        decode["nodes"][0]["name"] = f"x={ATTACK}"
    else:
        decode["outputs"][0] = f"x={ATTACK}"
    refused(sample, "programs/decode.json", decode, "not a program")
    assert MARK not in os.environ


def test_keywords_would_run_if_they_were_not_refused(decode, monkeypatch):
    """The attack is real: without the check its code runs."""
    monkeypatch.setattr(programs, "_name", lambda value: Word(value))
    monkeypatch.delenv(MARK, raising=False)

    class Word(str):
        def isidentifier(self):
            return True

    decode["nodes"] = [decode["nodes"][0]]
    decode["nodes"][0]["kwargs"] = {"map": {f"padding_idx={ATTACK}, scale_grad_by_freq": False}}
    decode["returns"], decode["outputs"] = [], []
    loaded = Program.from_json(decode)
    run = loaded.bind({name: torch.zeros(4, 4) for name in loaded.weights})
    with contextlib.suppress(TypeError, RuntimeError):  # it ran before aten could complain
        run(*(torch.zeros(1, 1, dtype=torch.int64) for _ in loaded.inputs))
    assert os.environ.pop(MARK) == "1"


@pytest.mark.parametrize(
    "operator",
    ["aten.from_file.default", "aten.set_.source_Storage", "aten.as_strided.default",
     "aten.resize_.default", "aten.empty.memory_format", "aten.full.default", "os.system.default",
     "shadowc.__init__.default", "aten.__class__.mro", "prim.device.default", "operator.matmul"],
)  # fmt: skip
def test_other_operators_are_refused(sample, decode, operator):
    decode["nodes"][0]["target"] = operator
    refused(sample, "programs/decode.json", decode, "not a program")


def test_the_list_of_operators_is_short_and_few_write():
    """A pass that emits another one extends it, and it is looked at."""
    assert len(programs._ATEN) <= 56 and [*programs._PYTHON] == ["operator.getitem"]
    aten = [programs._operator(f"aten.{name}") for name in programs._ATEN]
    own = [programs._operator(f"shadowc.{name}.default") for name in native.CPU_LAUNCHERS]
    writes = {operator._opname for operator in (*aten, *own) if operator._schema.is_mutable}
    assert writes == {"decode_attention", "choose_into", "lazy_qkv", "catch_up"}


@pytest.mark.parametrize("written", ["w0", "part", "head_index", "start"])
def test_programs_write_into_caches_and_what_they_made(sample, written):
    """Not into weights, parts of them, or other inputs."""
    hold = json.loads(sample.files["programs/hold.json"])
    part = {"name": "part", "target": "aten.select.int", "args": [{"node": "w0"}, 0, 0],
            "kwargs": {"map": {}}}  # fmt: skip
    hold["nodes"].insert(0, part)
    write = next(node for node in hold["nodes"] if "decode_attention" in node["target"])
    write["args"][5] = {"node": written}
    refused(sample, "programs/hold.json", hold, "writes into a weight")


def test_memory_that_was_not_written_is_not_shown(decode):
    node = {"name": "room", "target": "aten.new_empty.default",
            "args": [{"node": "w0"}, [1000]], "kwargs": {"map": {}}}  # fmt: skip
    decode |= {"nodes": [node], "returns": [{"node": "room"}], "outputs": ["logits"]}
    loaded = Program.from_json(decode)
    torch.full((1000,), 7.0)  # goes, and leaves its memory behind
    run = loaded.bind({name: torch.zeros(4) for name in loaded.weights})
    assert not run(*(torch.zeros(1) for _ in loaded.inputs))[0].any()


@pytest.mark.parametrize("where", [{"device": "meta"}, {"device": "cpu"}, "meta", 1])
@pytest.mark.parametrize("keyword", ["device", "layout"])
def test_a_program_does_not_say_where_tensors_are(sample, decode, keyword, where):
    """One without memory has the address 0, and a part of it an address of the program's choice."""
    node = {"name": "room", "target": "aten.new_zeros.default",
            "args": [{"node": "w0"}, [4]], "kwargs": {"map": {keyword: where}}}  # fmt: skip
    decode["nodes"].insert(0, node)
    refused(sample, "programs/decode.json", decode, "not a program")


def test_native_code_gets_tensors_of_the_cpu_only():
    nowhere = torch.zeros(1, 1, 8, device="meta")
    with pytest.raises(ShadowcError, match=r"(?s)'x' does not fit.*cpu.*meta"):
        native.CPU_LAUNCHERS["linear"](nowhere, torch.zeros(4, 8), None)
    sets = [torch.zeros(2, 1, 4, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)]
    arguments = [torch.zeros(1, 1, 8)], [torch.zeros(4, 8)], [torch.zeros(4)], [torch.zeros(1)]
    for place in range(6):
        x, weights, biases, thresholds = ([*one] for one in arguments)
        given = [x, weights, biases, thresholds, [*sets], [*sets]][place]
        given[place == 5] = given[place == 5].to("meta")
        chosen = given if place > 3 else sets
        with pytest.raises(ShadowcError, match="does not fit"):
            native.CPU_LAUNCHERS["choose_into"](
                x[0], None, None, weights, biases, thresholds, chosen, [1]
            )


LARGE = {
    "zeros": ("aten.new_zeros.default", [{"node": "start"}, [1 << 40]]),
    "in parts": ("aten.new_zeros.default", [{"node": "start"}, [1 << 20, 1 << 14]]),
    "empty": ("aten.new_zeros.default", [{"node": "start"}, [0, 1 << 40]]),
    "view": ("aten.expand.default", [{"node": "position"}, [1 << 44]]),
    "text": ("operator.mul", ["x", 1 << 40]),
    "number": ("operator.floordiv", [1 << 40, 3]),
    "MLP": (
        "shadowc.sparse_mlp.default",
        [{"node": "nothing"}, {"node": "wide"}, None, {"node": "wide"}, None, None, "relu", False,
         None, None],
    ),
    "product": ("aten.matmul.default", [{"node": "column"}, {"node": "row"}]),
    "attention": ("aten.scaled_dot_product_attention.default", [{"node": "keys"}] * 3),
    "values": (
        "aten.scaled_dot_product_attention.default",
        [{"node": "one"}, {"node": "one"}, {"node": "many"}],
    ),
}  # fmt: skip
#: Of no or little memory, of which operators make much for themselves.
SMALL = {"nothing": [1 << 11, 1 << 11, 0], "wide": [1 << 22, 0], "column": [1 << 17, 1, 0, 32],
         "row": [1, 1 << 17, 32, 1], "keys": [1, 1, 1 << 22, 0], "one": [1, 1, 64, 1],
         "many": [1 << 22, 1, 64, 0]}  # fmt: skip


@pytest.mark.parametrize("what", [*LARGE])
def test_memory_of_a_program_is_bounded_before_it_runs(sample, decode, what):
    """Also what an operator takes for itself."""
    target, args = LARGE[what]
    node = {"name": "much", "target": target, "args": args, "kwargs": {"map": {}}}
    small = [{"name": name, "target": "aten.new_zeros.default",
              "args": [{"node": "w0"}, size], "kwargs": {"map": {}}}
             for name, size in SMALL.items()]  # fmt: skip
    decode["nodes"] = [*small, node, *decode["nodes"]]
    refused(sample, "programs/decode.json", decode, "operator |too large|beside its result")


def test_what_is_held_at_once_counts(sample, decode):
    """Each of these fits; all of them do not."""
    rows = [
        {"name": f"part{i}", "target": "aten.new_zeros.default",
         "args": [{"node": "start"}, [1 << 22]], "kwargs": {"map": {}}}
        for i in range(40)
    ]  # fmt: skip
    together = {"name": "all", "target": "aten.stack.default",
                "args": [[{"node": row["name"]} for row in rows]],
                "kwargs": {"map": {}}}  # fmt: skip
    decode["nodes"] = [*rows, together, *decode["nodes"]]
    refused(sample, "programs/decode.json", decode, "at once|too large")


def test_a_long_artifact_may_not_hold_more(sample, decode):
    """What a program may hold does not follow from the length that the manifest gives."""
    node = {"name": "much", "target": "aten.new_zeros.default",
            "args": [{"node": "start"}, [1 << 25]], "kwargs": {"map": {}}}  # fmt: skip
    decode["nodes"].insert(0, node)
    sample.put("programs/decode.json", json.dumps(decode).encode())
    sample.seal(max_seq_len=1 << 24)
    with pytest.raises(ArtifactError, match="too large"):
        load_session(open_artifact(sample.root))


def test_a_shape_that_the_weights_do_not_have_is_refused(sample):
    shape = sample.manifest["shape"] | {"layers": 2000}
    sample.seal(shape=shape)
    with pytest.raises(ArtifactError, match=MANIFEST):
        load_session(open_artifact(sample.root))


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "code.Config"}}),
        ("config.json", {"attn_implementation": "kernels-community/flash-attn"}),
        ("config.json", {"text_config": {"_attn_implementation": "org/kernels"}}),
        ("config.json", {"model_type": "rag"}),
        ("generation_config.json", {"custom_generate": "org/code"}),
        ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}),
    ],
)
def test_hugging_face_files_name_no_code_and_no_path(sample, name, entry):
    refused(sample, name, json.loads(sample.files[name]) | entry, "damaged")


@pytest.mark.parametrize("target", ["../outside", "/etc/passwd", "report.json", "/dev/zero"])
@pytest.mark.parametrize("name", ["config.json", "programs/decode.json", MANIFEST])
def test_links_are_not_followed(sample, name, target):
    sample.put(name, link=target)
    with pytest.raises(ArtifactError, match=name.rpartition("/")[2]):
        open_artifact(sample.root)


def test_a_folder_that_is_a_link_is_not_followed(sample, tmp_path):
    (sample.root / "programs").rename(tmp_path / "elsewhere")
    (sample.root / "programs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="programs"):
        open_artifact(sample.root)


def test_pipes_are_not_waited_for(sample):
    sample.put("config.json")
    os.mkfifo(sample.root / "config.json")
    with pytest.raises(ArtifactError, match="not a link or anything else"):
        open_artifact(sample.root)


@pytest.mark.parametrize("name", [f"{MANIFEST}.new", "report.json.new", "report.html.new"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_nothing_is_written_through_links_and_pipes(sample, name, kind):
    """Neither by who opens an artifact nor, if it is put there later, by who adds to its report."""
    artifact, place = open_artifact(sample.root), sample.root / name
    if kind == "link":
        place.symlink_to("../outside")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(ArtifactError, match=name):
        open_artifact(sample.root)
    with contextlib.suppress(OSError):  # a folder is in the way
        update_report(artifact, "note", {"x": 1}, lambda artifact: {"report.html": "drawn"})
    assert (sample.root.parent / "outside").read_bytes() == b"secret"
    if kind != "folder":
        assert open_artifact(sample.root).report()["note"] == {"x": 1}


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "programs/../../outside", "a//b"])
def test_names_stay_inside(sample, name):
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    sample.seal(files=sample.manifest["files"] | {name: entry})
    with pytest.raises(ArtifactError, match="files inside the artifact"):
        open_artifact(sample.root)


@pytest.mark.parametrize("name", ["modeling.py", "vocab.json", "programs/more.json", "lib.so"])
def test_what_is_not_listed_is_refused(sample, name):
    sample.put(name, b"{}")
    with pytest.raises(ArtifactError, match=name.rpartition("/")[2]):
        open_artifact(sample.root)


@pytest.mark.parametrize(
    "name",
    ["adapter_config.json", "processor_config.json", "preprocessor_config.json", "modeling.py",
     "programs/more.json", "programs/dense.pt2", "kernels/sm_90/lib.so", "weights.bin", "x.onnx"],
)  # fmt: skip
def test_files_that_libraries_would_find_are_not_listed(sample, name):
    """peft fetches the model that an adapter's config names."""
    (sample.root / name).parent.mkdir(parents=True, exist_ok=True)
    (sample.root / name).write_bytes(b"{}")
    entry = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    sample.seal(files=sample.manifest["files"] | {name: entry})
    with pytest.raises(ArtifactError, match=rf"(?s){MANIFEST}.*{name}"):
        open_artifact(sample.root)


def test_every_program_may_be_listed(tmp_path):
    names = [f"programs/{name}.json" for name in PROGRAMS]
    foreign.check_listing(tmp_path, dict.fromkeys(names), MANIFEST)


@pytest.mark.parametrize("target", ["cpu", "onnx-cpu"])
def test_what_a_checkpoints_config_points_to_is_left_out(target, tiny_llama, tmp_path):
    """That of a GGUF file has a path, for one."""
    config = copy.deepcopy(tiny_llama.loaded.model.config)
    config._model_name_or_path, config.auto_map = "A name", {"AutoConfig": "code.Config"}
    own = artifact_config(config, target, 64)
    own.save_pretrained(tmp_path)
    foreign.check_hugging_face(tmp_path, {"config.json": {}})
    assert config.auto_map and own.hidden_size == config.hidden_size
    config.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="names no code and no path"):
        foreign.check_hugging_face(tmp_path, {"config.json": {}})


@pytest.mark.parametrize(
    "place", [(), ("model",), ("model", "decoder"), ("model", "decoder", "session_options")]
)
def test_a_config_of_genai_names_no_library(tmp_path, place):
    shape = SimpleNamespace(architecture="llama", vocab=8, head_dim=8, hidden=8, heads=1, layers=1,
                            kv_heads=1)  # fmt: skip
    session = SimpleNamespace(shape=shape, max_seq_len=8)
    config = genai_config(session, {"eos_token_id": 1}, "cuda")

    def check():
        (tmp_path / "genai_config.json").write_text(json.dumps(config))
        foreign.check_hugging_face(tmp_path, dict.fromkeys(("genai_config.json", "model.onnx")))

    check()
    owner = config
    for key in place:
        owner = owner[key]
    owner["custom_ops_library"] = "x.so"
    with pytest.raises(ArtifactError, match=r"(?s)genai_config.*no custom_ops_library"):
        check()


def test_chat_templates_are_run_in_a_sandbox(sample):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    sample.put("chat_template.jinja", template.encode())
    entry = {"bytes": len(template), "sha256": hashlib.sha256(template.encode()).hexdigest()}
    sample.seal(files=sample.manifest["files"] | {"chat_template.jinja": entry})
    tokenizer = shadowc.load(sample.root).tokenizer
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_what_people_add_is_welcome(sample):
    for name in ("README.md", ".gitattributes", "LICENSE"):
        (sample.root / name).write_text("x")
    open_artifact(sample.root)


def test_every_file_has_size_and_hash(sample):
    """Any bit of any file, and any file cut short or gone."""
    for name, content in sample.files.items():
        for damage in (None, content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
            sample.put(name, damage)
            with pytest.raises(ArtifactError, match=name.rpartition("/")[2]):
                open_artifact(sample.root)
        sample.restore()


def test_the_manifest_has_a_checksum_of_its_own(sample):
    text = (sample.root / MANIFEST).read_text()
    sample.put(MANIFEST, text.replace('"max_seq_len": 32', '"max_seq_len": 31').encode())
    with pytest.raises(ArtifactError, match="what its checksum says"):
        open_artifact(sample.root)
    value = copy.deepcopy(sample.manifest)
    del value["checksum"]
    sample.put(MANIFEST, json.dumps(value).encode())
    with pytest.raises(ArtifactError, match="what its checksum says"):
        open_artifact(sample.root)


def test_an_artifact_of_another_schema_says_what_to_do(sample):
    sample.seal(schema=1)
    with pytest.raises(ArtifactError, match=r"(?s)schema 2.*compile the artifact again"):
        open_artifact(sample.root)


@pytest.mark.parametrize(
    "text",
    [b'{"a": 1, "a": 1}', b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}', b"[" * 33,
     b'{"a": ' + b"1" * 40 + b"}", b'{"a": "\xff"}', b"\xef\xbb\xbf{}", b'{"a": [1,]}'],
)  # fmt: skip
def test_json_has_one_meaning(tmp_path, text):
    with pytest.raises(ArtifactError, match="x.json"):
        foreign.loads(text, tmp_path / "x.json")


def test_long_json_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(foreign.MOST_JSON + 1)
    with pytest.raises(ArtifactError, match=r"(?s)x\.json.*at most 8388608 bytes"):
        foreign.read_object(tmp_path, "x.json")


def test_a_header_accounts_for_every_byte(sample, fuzz):
    name = "predictor.safetensors"
    header, data = fuzz.header_of(sample.files[name])
    first, second = [key for key in header if key != "__metadata__"][:2]
    for key, value in (("data_offsets", header[second]["data_offsets"]), ("shape", [1 << 40]),
                       ("dtype", "F8"), ("shape", [-1])):  # fmt: skip
        wrong = copy.deepcopy(header)
        wrong[first][key] = value
        refused(sample, name, fuzz.with_header(json.dumps(wrong).encode(), data), "damaged")
    halved = header | {"__metadata__": {"format": "\ud800"}}  # Python takes it, safetensors not
    refused(sample, name, fuzz.with_header(json.dumps(halved).encode(), data), f"{name} is damaged")
    for length in (1 << 62, len(sample.files[name])):
        refused(
            sample, name, fuzz.with_header(json.dumps(header).encode(), data, length), "damaged"
        )


def test_keep_sets_that_never_change_are_checked(fuzz, tmp_path, tiny_opt):
    from shadowc.runtime.checks import _check_keep

    shape = tiny_opt.shape
    index = torch.arange(shape.ffn, dtype=torch.int32).repeat(shape.layers, 1, 1)
    count = torch.full((shape.layers, 1), 10, dtype=torch.int32)

    def check(index, count):
        tensors = {"keep.neuron_index": index, "keep.neuron_count": count}
        _check_keep(tmp_path, tensors, tensors, shape)

    check(index, count)
    with pytest.raises(ArtifactError, match=r"(?s)predictor.safetensors.*keep\.position"):
        _check_keep(tmp_path, {}, {"keep.position": count}, shape)
    for place, value in ((3, shape.ffn), (3, -1), (3, 2), (0, 5)):
        wrong = index.clone()
        wrong[1, 0, place] = value
        with pytest.raises(ArtifactError, match="predictor.safetensors"):
            check(wrong, count)
    for wrong in (count + shape.ffn, -count, count.long(), count[:1]):
        with pytest.raises(ArtifactError, match="predictor.safetensors"):
            check(index, wrong)


def test_a_token_that_the_model_does_not_know_is_an_error(sample):
    session = load_session(open_artifact(sample.root))
    with pytest.raises(ShadowcError, match="programs/"):
        session.step(torch.tensor([[10**6]]), session.new_cache(1))


@pytest.mark.parametrize("wrong", [struct.error("x"), ZeroDivisionError(), AssertionError()])
@pytest.mark.parametrize("when", ["bound", "called"])
def test_whatever_a_program_raises_is_an_error_that_names_it(sample, wrong, when, monkeypatch):
    def fail(*arguments):
        raise wrong

    session = load_session(open_artifact(sample.root))
    bind = fail if when == "bound" else lambda self, tensors: fail
    monkeypatch.setattr(Program, "bind", bind)
    with pytest.raises(ArtifactError, match=r"programs/prefill\.json"):
        session.step(torch.tensor([[5, 6]]), session.new_cache(1))
    wrong = MemoryError()
    with pytest.raises(MemoryError):
        session.step(torch.tensor([[5, 6]]), session.new_cache(1))


def test_a_choice_has_lists_of_equal_lengths():
    sets = [torch.zeros(2, 1, 4, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)]
    lists = [[torch.zeros(4, 8)], [torch.zeros(4)], [torch.zeros(1)], sets, [1]]
    choose, x = native.CPU_LAUNCHERS["choose_into"], torch.zeros(1, 1, 8)
    choose(x, None, None, *lists)
    for place, given in enumerate(lists):
        for wrong in ([], given[:-1], given * 2):
            with pytest.raises(ShadowcError, match="a tap chooses"):
                choose(x, None, None, *lists[:place], wrong, *lists[place + 1 :])


@pytest.mark.parametrize("name", ["kernels/sm_90/index.json", "programs/decode.pt2"])
def test_machine_code_can_be_refused(sample, name, monkeypatch):
    (sample.root / name).parent.mkdir(parents=True, exist_ok=True)
    (sample.root / name).write_bytes(b"{}")
    entry = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    sample.seal(files=sample.manifest["files"] | {name: entry})
    monkeypatch.setenv(NO_NATIVE, "0")
    open_artifact(sample.root)
    monkeypatch.setenv(NO_NATIVE, "1")
    with pytest.raises(ArtifactError, match=r"(?s)holds machine code.*--no-native"):
        open_artifact(sample.root)


def test_an_artifact_without_machine_code_runs_with_no_native(sample, monkeypatch):
    monkeypatch.setenv(NO_NATIVE, "1")
    load_session(open_artifact(sample.root))


def test_onnx_models_for_gpus_bring_machine_code():
    manifest = {"target": "onnx-cuda", "files": {"model.onnx": {}}}
    assert foreign.brings_machine_code(manifest) == ["model.onnx"]
    assert not foreign.brings_machine_code(manifest | {"target": "onnx-cpu"})


@pytest.mark.parametrize("command", ["run", "eval", "bench", "serve"])
def test_commands_take_no_native(sample, command, monkeypatch):
    from typer.testing import CliRunner

    from shadowc.cli import app

    name = "kernels/sm_90/x.cubin"
    (sample.root / name).parent.mkdir(parents=True)
    (sample.root / name).write_bytes(b"{}")
    entry = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    sample.seal(files=sample.manifest["files"] | {name: entry})
    monkeypatch.setenv(NO_NATIVE, "0")
    more = ["--prompt", "x"] if command == "run" else []
    done = CliRunner().invoke(app, [command, str(sample.root), "--no-native", *more])
    assert done.exit_code == 2 and "holds machine code" in done.output + str(done.stderr)


def test_another_build_of_the_library_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SHADOWC_LIBRARY", str(tmp_path / "other.so"))
    assert native.library_file() == tmp_path / "other.so"


def test_the_report_changes_and_the_artifact_stays_sound(sample):
    artifact = open_artifact(sample.root)
    update_report(artifact, "note", {"x": 1})
    assert open_artifact(sample.root).report()["note"] == {"x": 1}


def test_the_page_of_a_report_shows_its_texts_as_texts(sample):
    markup = "<script>alert(1)</script>"
    report = json.loads(sample.files["report.json"])
    report["eval"] = {"variants": {markup: {"perplexity": 1.0, "head_sparsity": 0.0,
                                            "neuron_sparsity": 0.0}},
                      "tokens": markup, "data": markup, "seq_len": [markup]}  # fmt: skip
    texts = dict.fromkeys(("device", "isa", "threads", "batch", "dtype"), markup)
    units = {name: report["compile"][name] for name in
             ("heads_by_layer", "neurons_by_layer", "rows_by_layer")}  # fmt: skip
    numbers = dict.fromkeys(("ms_per_token", "dense_ms_per_token", "bytes_per_token",
                             "dense_bytes_per_token"), 1)  # fmt: skip
    report["bench"] = {**texts, **units, **numbers}
    sample.put("report.json", json.dumps(report).encode())
    sample.seal()
    text = render(open_artifact(sample.root))
    assert "<script" not in text and text.count("&lt;script") == 9 and "malformed" not in text


@pytest.mark.parametrize("wrong", [{}, {"variants": {"x": 1}}, [], "x", {"dense_ms_per_token": 0}])
def test_a_malformed_section_does_not_lose_the_page(sample, wrong):
    report = json.loads(sample.files["report.json"]) | {"eval": wrong, "bench": wrong}
    sample.put("report.json", json.dumps(report).encode())
    sample.seal()
    artifact = open_artifact(sample.root)
    save_section(artifact, "note", {"x": 1})
    assert open_artifact(sample.root).report()["note"] == {"x": 1}
    assert (sample.root / "report.html").read_text().count("is malformed") == 3


def test_external_data_of_onnx_models_stays_beside_them(tmp_path):
    onnx = pytest.importorskip("onnx")
    from shadowc.onnx.check import check_model

    (tmp_path / "outside").write_bytes(bytes(64))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(64))
    (folder / "link").symlink_to(tmp_path / "outside")

    def model(location, offset=0, length=64, dims=(16,), data_type=1, default=False):
        tensor = onnx.TensorProto(name="w", data_type=data_type, dims=dims, data_location=1)
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            if value is not None:
                tensor.external_data.add(key=key, value=str(value))
        graph = onnx.helper.make_graph([], "g", [], [], [] if default else [tensor])
        made = onnx.helper.make_model(graph)
        if default:
            function = onnx.FunctionProto(name="f", domain="d")
            function.attribute_proto.append(onnx.helper.make_attribute("w", tensor))
            made.functions.append(function)
        (folder / "m.onnx").write_bytes(made.SerializeToString())
        return folder / "m.onnx"

    check_model(model("weights"))
    check_model(model("weights", length=None))
    for wrong in (
        {"length": None, "offset": 1}, {"length": None, "dims": [17]}, {"dims": [17]},
        {"length": None, "dims": [-1]}, {"data_type": 11}, {"data_type": 99},
        {"location": "../outside", "default": True},
    ):  # fmt: skip
        with pytest.raises(ArtifactError):
            check_model(model(**{"location": "weights"} | wrong))
    elsewhere = str(tmp_path / "outside")
    names = (("../outside",), (elsewhere,), ("link",), ("gone",), ("",))
    places = (("weights", 1), ("weights", -1), ("weights", 0, 1 << 62), ("weights", "x"))
    for wrong in names + places:
        with pytest.raises(ArtifactError):
            check_model(model(*wrong))
    (folder / "m.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        check_model(folder / "m.onnx")


def test_graphs_of_onnx_are_not_looked_into(tmp_path):
    """One that asks for 4 TiB passes: what it computes is ONNX Runtime's to run or refuse."""
    onnx = pytest.importorskip("onnx")
    from shadowc.onnx.check import check_model

    shape = onnx.helper.make_tensor("shape", 7, [1], [1 << 40])
    node = onnx.helper.make_node("ConstantOfShape", ["shape"], ["much"])
    much = onnx.helper.make_tensor_value_info("much", 1, [None])
    graph = onnx.helper.make_graph([node], "g", [], [much], [shape])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    check_model(tmp_path / "m.onnx")


#: What reads pickles or evaluates text, as names of modules and of what they hold.
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
          "eval", "exec", "compile", "torch.load", "torch.jit.load", "torch.export.load",
          "pandas.read_pickle", "yaml.load"}  # fmt: skip


def unsafe(text):
    """The lines of a source that read pickles or evaluate text."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = set()
        if isinstance(node, ast.Import):
            names = {part for a in node.names for part in (a.name, a.name.partition(".")[0])}
        elif isinstance(node, ast.ImportFrom):
            names = {node.module or "", *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Call):
            names = {ast.unparse(node.func)}
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            names = {"eval"} if ast.unparse(node.value) != "False" else set()
        if names & UNSAFE:
            found.append(getattr(node, "lineno", 0))
    return found


def test_no_pickle_and_no_code_in_the_sources():
    """Nothing in the package reads pickles or evaluates text; fx's generated functions excepted."""
    root = Path(shadowc.__file__).parent
    paths = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True)
             for name in names if name.endswith(".py")]  # fmt: skip
    assert {"passes", "targets", "cuda", "calibration", "vllm"} <= {p.parent.name for p in paths}
    found = {str(path): lines for path in paths if (lines := unsafe(path.read_text()))}
    assert not found


@pytest.mark.parametrize(
    "text",
    ["import pickle", "import pickle as p", "from pickle import loads", "x = eval('1')",
     "from torch import load", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=x)",
     "torch.load(f)", "f(trust_remote_code=yes)", "from torch.export import load"],
)  # fmt: skip
def test_the_look_at_the_sources_sees(text):
    assert unsafe(text) == [1]


def test_a_checksum_is_no_signature(sample, fuzz):
    """Whoever changes weights can change hashes too: such an artifact is another artifact."""
    name = "predictor.safetensors"
    sample.put(name, sample.files[name][:-1] + b"\x01")
    sample.seal()
    open_artifact(sample.root)


def test_the_original_model_brings_no_code(sample, tmp_path, monkeypatch):
    """What `eval --against oracle` and `bench` load by the name in the manifest."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from shadowc.models import load_model

    path = tmp_path / "original"
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size=260, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(sample.root).save_pretrained(path)
    (path / "code.py").write_text(f"import os\nos.environ['{MARK}'] = '1'\n")
    for name, entry in (
        ("config.json", {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["code.T", None]}),
    ):
        value = json.loads((path / name).read_text()) | {"auto_map": entry}
        (path / name).write_text(json.dumps(value))
    monkeypatch.delenv(MARK, raising=False)
    with contextlib.suppress(ShadowcError):  # it loads as what it is, or is refused
        load_model(str(path))
    assert MARK not in os.environ


@pytest.mark.parametrize(
    ("settings", "loads"),
    [({}, True), ({"hugging_face": False}, False), ({"against": ["oracle"]}, True),
     ({"against": ["dense", "static", "random"]}, False)],
)  # fmt: skip
def test_what_the_manifest_names_is_loaded_only_if_asked(
    sample, tmp_path, monkeypatch, settings, loads
):
    """By `bench` unless it is told not to, by `eval` for the oracle alone."""
    from shadowc.evaluation import bench, perplexity, sources

    class Reached(Exception):
        pass

    def measure(*arguments, **options):
        raise Reached

    named = []
    monkeypatch.setattr(sources, "load_model", lambda name, **options: named.append(name))
    monkeypatch.setattr(bench, "_take_turns", measure)  # all is loaded then
    sample.seal(model=sample.manifest["model"] | {"name": "random:opt-66b"})
    (tmp_path / "text").write_text("once upon a time " * 40)
    data = {"data": str(tmp_path / "text")}
    opened = open_artifact(sample.root)
    with contextlib.suppress(Reached, AttributeError):  # nothing comes of what was named
        if "against" in settings:
            perplexity.evaluate_artifact(opened, seq_len=16, tokens=64, **data, **settings)
        else:
            bench.bench(opened, prompt_len=8, new_tokens=24, **data, **settings)
    assert named == ["random:opt-66b"] * loads
