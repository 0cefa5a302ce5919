"""Hostile artifacts by the thousand: generators, and the process that tries them.

    python tests/hostile/fuzz.py --long        the table of benchmarks/results/hardening.md

A case is a small artifact with something wrong in it; most have their hashes made right again, so
that what lies behind them is reached. A worker opens or loads each. It must be refused by a
`ShadowcError` that names the file, or run; no crash, no hang, nothing opened outside of the
directory and nothing written, no more memory than a stated base and 1.5 times the files.

Every case is a function of (kind, seed): a failure says how to have it again.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shadowc import foreign
from shadowc.artifact import MANIFEST, Artifact, open_artifact, sealed
from shadowc.errors import ShadowcError
from shadowc.evaluation.masks import teacher_forced
from shadowc.evaluation.report import describe_artifact
from shadowc.manifest import read_policy, read_shape
from shadowc.runtime.checks import check_programs
from shadowc.runtime.loading import load
from shadowc.runtime.program import Program
from shadowc.runtime.session import Session
from shadowc.targets import load_target

SECONDS = 2.0
"""CPU time of a case: more is a hang."""
BASE = 192 << 20
"""Bytes of memory that a worker may take beside 1.5 times the files: interpreter and libraries."""

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 1.5, -0.5, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63),
    1 << 70, "", "x", "..", "../../etc/passwd", "/etc/passwd", "a" * 5000, "\x00", "\ud800", "w0",
    "input_ids", "__class__", "__import__('os').abort()", [], {}, [[]], [0] * 50, {"node": "w0"},
    {"torch": "load"}, {"device": "cuda:99"}, {"map": {"a b": 1}}, {"node": "nowhere"},
    [1 << 40, 1 << 40], "aten.from_file.default", "aten.full.default", "shadowc.linear.default",
    "operator.mul",
)  # fmt: skip


@dataclass
class Sample:
    """A sound artifact, held as bytes, in a directory that cases damage and put right again.

    Attributes:
        root: The directory.
        files: What its files hold, by name, without the manifest.
        manifest: What its manifest says.
        changed: Names of files that the case at hand has damaged.
    """

    root: Path
    files: dict[str, bytes]
    manifest: dict[str, Any]
    changed: set[str] = field(default_factory=set)

    @staticmethod
    def copy(artifact: Path, root: Path) -> Sample:
        """A copy of an artifact."""
        shutil.copytree(artifact, root)
        manifest = json.loads((root / MANIFEST).read_text())
        return Sample(root, {n: (root / n).read_bytes() for n in manifest["files"]}, manifest)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.files.values()))

    def put(self, name: str, content: bytes | None = None, *, link: str | None = None) -> None:
        """Write a file, or a link; None removes it."""
        path = self.root / name
        self.changed.add(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if link is not None:
            path.symlink_to(link)
        elif content is not None:
            path.write_bytes(content)

    def seal(self, **changes: Any) -> None:
        """Write a manifest that fits the files as they are now."""
        files = dict(self.manifest["files"])
        for name in self.changed & files.keys():
            path = self.root / name
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                digest = foreign.hashlib.sha256(content).hexdigest()
                files[name] = {"bytes": len(content), "sha256": digest}
        manifest = self.manifest | {"files": files} | changes
        self.put(MANIFEST, sealed(manifest).encode("utf-8", "surrogatepass"))

    def restore(self) -> None:
        """Put everything right again."""
        for name in self.changed:
            known = self.files.get(name)
            self.put(name, known)
        if MANIFEST in self.changed:
            self.put(MANIFEST, (json.dumps(self.manifest, indent=2) + "\n").encode())
        self.changed.clear()


# ---------------------------------------------------------------------------- what is done to files


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as keys and indices."""
    yield path
    for key in [*value] if isinstance(value, dict) else ():
        yield from places(value[key], (*path, key))
    for key, item in enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def changed(value: Any, path: Sequence[Any], change: Callable[[Any], Any]) -> Any:
    """The value with something else at one place."""
    if not path:
        return change(value)
    made = value.copy()
    made[path[0]] = changed(made[path[0]], path[1:], change)
    return made


def disturbed(value: Any, rng: random.Random) -> Any:
    """A JSON value with something hostile in it: replaced, removed, added, doubled or swapped."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice([*places(value)][1:] or [()])
        kind = rng.randrange(5)
        if kind < 3 or not path:
            value = changed(value, path, lambda _: rng.choice(HOSTILE))
            continue

        def part(owner: Any, path: tuple[Any, ...] = path, kind: int = kind) -> Any:
            made = owner.copy()
            if kind == 3:
                del made[path[-1]]
            elif isinstance(made, dict):
                made[str(rng.choice(HOSTILE))[:40]] = made[path[-1]]
            else:
                made.append(made[rng.randrange(len(made))])
            return made

        value = changed(value, path[:-1], part)
    return value


def text_of(value: Any) -> bytes:
    """JSON, also of what JSON cannot hold."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def broken_text(text: bytes, rng: random.Random) -> bytes:
    """JSON text that two readers may understand in two ways, or that none should."""
    decoded = text.decode()
    kind = rng.randrange(7)
    if kind == 0:  # a key twice
        at = decoded.index("{") + 1
        key = rng.choice(('"schema"', '"files"', '"inputs"', '"target"', '"weight_map"'))
        return f"{decoded[:at]}{key}: 1, {key}: 2, {decoded[at:]}".encode()
    if kind == 1:
        return decoded.replace(
            "1", rng.choice(("NaN", "Infinity", "-Infinity", "1e999")), 1
        ).encode()
    if kind == 2:
        deep = rng.choice((33, 900, 100_000))
        return ("[" * deep + "]" * (deep * rng.randrange(2))).encode()
    if kind == 3:
        deep = rng.choice((40, 2000))
        return ('{"a":' * deep + "1" + "}" * deep).encode()
    if kind == 4:
        return decoded.replace("1", "1" * rng.choice((40, 5000, 100_000)), 1).encode()
    if kind == 5:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice((b"\xff\xfe", b"\x00", b"\xc3", b'"', b"\\u")) + text[at:]
    return b"\xef\xbb\xbf" + text


def flipped(content: bytes, rng: random.Random) -> bytes:
    """One to eight bits turned."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of any header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


# ---------------------------------------------------------------------------- the kinds of cases

Damage = Callable[[Sample, random.Random, int], bool]
"""Damages a sample; the number counts a kind's cases. Says whether the hashes still tell."""


def flip(sample: Sample, rng: random.Random, number: int) -> bool:
    """Flipped bits in any file."""
    name = rng.choice([*sample.files, MANIFEST])
    if name == MANIFEST:
        sample.put(name, flipped((sample.root / name).read_bytes(), rng))
        return False
    sample.put(name, flipped(sample.files[name], rng))
    if seal := rng.random() < 0.7:
        sample.seal()
    return not seal


def truncate(sample: Sample, rng: random.Random, number: int) -> bool:
    """A file cut at every one of its places in turn, the others at random ones."""
    names = [MANIFEST, *sample.files]
    name = names[number % len(names)]
    content = (sample.root / name).read_bytes()
    at = number // len(names)
    sample.put(name, content[: at if at < len(content) else rng.randrange(len(content))])
    if (seal := rng.random() < 0.6) and name != MANIFEST:
        sample.seal()
    return not seal and name != MANIFEST


def manifest_values(sample: Sample, rng: random.Random, number: int) -> bool:
    """Hostile values anywhere in the manifest, its checksum right."""
    made = disturbed(sample.manifest, rng)
    if isinstance(made, dict):
        made["checksum"] = foreign.seal(made)
    sample.put(MANIFEST, text_of(made))
    return False


def json_text(sample: Sample, rng: random.Random, number: int) -> bool:
    """JSON with keys twice, NaN, deep nesting, long numbers, wrong bytes."""
    names = [MANIFEST, *(name for name in sample.files if name.endswith(".json"))]
    name = rng.choice([n for n in names if n != "tokenizer.json"])
    sample.put(name, broken_text((sample.root / name).read_bytes(), rng))
    if name != MANIFEST:
        sample.seal()
    return False


def headers(sample: Sample, rng: random.Random, number: int) -> bool:
    """Headers of safetensors: values, lengths, overlaps, holes, sizes beyond the file."""
    name = rng.choice([name for name in sample.files if name.endswith(".safetensors")])
    header, data = header_of(sample.files[name])
    kind = rng.randrange(4)
    if kind == 0:
        text = text_of(header)
        length = rng.choice((0, 1, len(text) - 1, len(text) + 1, 1 << 31, (1 << 64) - 1, 1 << 63))
        sample.put(name, with_header(text, data, length))
    elif kind == 1:
        sample.put(name, with_header(broken_text(text_of(header), rng), data))
    else:
        key = rng.choice([*header])
        owner = {key: header[key]} if kind == 2 else header
        made = disturbed(owner, rng)
        made = header | made if kind == 2 and isinstance(made, dict) else made
        sample.put(name, with_header(text_of(made), data))
    sample.seal()
    return False


def index(sample: Sample, rng: random.Random, number: int) -> bool:
    """The index of shards."""
    name = next(name for name in sample.files if name.endswith(".index.json"))
    sample.put(name, text_of(disturbed(json.loads(sample.files[name]), rng)))
    sample.seal()
    return False


NAMES = (
    "../outside", "/etc/passwd", "programs/../../outside", "./config.json", "programs//dense.json",
    "a" * 300, "programs", "", ".", "..", "con\x00fig.json", "config.json/", "~/x",
    "a\nb", "\ud800",
    "C:\\x", "programs/a/b/c/d/e/f", "-x",
)  # fmt: skip


def paths(sample: Sample, rng: random.Random, number: int) -> bool:
    """Names that leave the directory, links, pipes, folders in place of files, files unlisted."""
    outside = sample.root.parent / "outside"
    kind = number % 6
    name = rng.choice([*sample.files])
    if kind == 0:
        entry = {"bytes": 6, "sha256": foreign.hashlib.sha256(b"secret").hexdigest()}
        sample.seal(files=sample.manifest["files"] | {rng.choice(NAMES): entry})
    elif kind == 1:
        target = rng.choice((str(outside), "/etc/passwd", "/dev/zero", name, "../outside"))
        sample.put(name, link=target)
        if rng.random() < 0.5:
            entry = {"bytes": 6, "sha256": foreign.hashlib.sha256(b"secret").hexdigest()}
            sample.seal(files=sample.manifest["files"] | {name: entry})
    elif kind == 2:
        sample.put(name)
        os.mkfifo(sample.root / name)
    elif kind == 3:
        sample.put(name)
        (sample.root / name).mkdir()
    elif kind == 4:
        extra = rng.choice((
            "programs/extra.json", "modeling.py", "vocab.json", "adapter_config.json", "lib.so",
            "special_tokens_map.json", "kernels/sm_90/index.json", "chat_template.jinja", "x.pt2",
        ))  # fmt: skip
        folder = extra.split("/")[0]
        if folder not in (extra, "programs"):
            (sample.root / extra).parent.mkdir(parents=True)
            sample.changed.add(folder)  # goes with what is in it
            (sample.root / extra).write_bytes(b"{}")
        else:
            sample.put(extra, b"{}")
    else:
        sample.put(MANIFEST, link=rng.choice((str(outside), "report.json", "/dev/zero", "nowhere")))
    return True


KEYS = (
    "auto_map", "trust_remote_code", "attn_implementation", "_attn_implementation", "vocab_file",
    "tokenizer_file", "merges_file", "custom_generate", "quantization_config", "model_path",
)  # fmt: skip


def hugging_face(sample: Sample, rng: random.Random, number: int) -> bool:
    """Configs and tokenizers that name code, kernels of a hub, or files elsewhere."""
    name = rng.choice(("config.json", "generation_config.json", "tokenizer_config.json"))
    value = json.loads(sample.files[name])
    kind = number % 4
    if kind == 0:
        hostile = rng.choice(("kernels-community/x", {"AutoConfig": "x.y"}, "/etc/passwd", ["a.b"]))
        owner = {rng.choice(KEYS): hostile}
        value = value | (owner if rng.random() < 0.7 else {"nested": [owner]})
    elif kind == 1:
        value["tokenizer_class"] = rng.choice(
            ("RagTokenizer", "os.system", 1, ["x"], "BertTokenizer")
        )
    elif kind == 2:
        name, value = "config.json", json.loads(sample.files["config.json"])
        value["model_type"] = rng.choice(("bert", None, "../x", 1, "rag", "trust", []))
    else:
        name = rng.choice((name, "tokenizer.json"))
        value = disturbed(json.loads(sample.files[name]), rng)
    sample.put(name, text_of(value))
    sample.seal()
    return False


def report(sample: Sample, rng: random.Random, number: int) -> bool:
    """What the artifact says of itself, described as `inspect` does."""
    sample.put("report.json", text_of(disturbed(json.loads(sample.files["report.json"]), rng)))
    sample.seal()
    return False


def program(sample: Sample, rng: random.Random, number: int) -> bool:
    """Operators, arguments and names of a program."""
    name = rng.choice([n for n in sample.files if n.startswith("programs/")])
    value = json.loads(sample.files[name])
    part = rng.choice(("whole", "node", "node", "node", "inserted"))
    if part == "whole":
        value = disturbed(value, rng)
    elif part == "node":
        at = rng.randrange(len(value["nodes"]))
        value["nodes"][at] = disturbed(value["nodes"][at], rng)
    else:
        at = rng.randrange(len(value["nodes"]))
        value["nodes"].insert(at, hostile_node(rng, value["nodes"][at]["args"]))
    sample.put(name, text_of(value))
    sample.seal()
    return False


def hostile_node(rng: random.Random, args: list[Any]) -> dict[str, Any]:
    """A call that asks for memory, files, time or code."""
    big = 1 << 40
    x = {"node": "input_ids"}
    target, given, more = rng.choice((
        ("aten.full.default", [[big], 1.0], {}),
        ("aten.new_zeros.default", [x, [big]], {}),
        ("aten.new_zeros.default", [x, [1 << 20, 1 << 14]], {"device": {"device": "cpu"}}),
        ("aten.new_empty.default", [x, [big, big]], {}),
        ("aten.expand.default", [{"node": "position"}, [big]], {}),
        ("aten.from_file.default", ["/etc/passwd"], {}),
        ("aten.to.dtype", [x, {"torch": "hub"}], {}),
        ("operator.mul", ["x", big], {}),
        ("aten.new_zeros.default", [x, [4]], {"device": "meta"}),
        ("aten.new_zeros.default", [x, [0, 1 << 20]], {}),
        ("aten.matmul.default", [{"node": "w0"}, {"node": "w0"}], {}),
        ("shadowc.choose_into.default", [x, None, None, [], [], [], [], []], {}),
        ("shadowc.decode_attention.default", [{"node": "w0"}] * 9 + [1.0, None, None], {}),
        ("operator.getitem", [{"node": "w0"}, big], {}),
        ("aten.set_.source_Storage", [x], {}),
        ("aten.as_strided.default", [x, [1000], [1000]], {}),
        ("shadowc.__init__.default", args, {}),
        ("aten.add.Tensor", [x, x], {"alpha=__import__('os').abort(), x": 1}),
        ("aten.add.Tensor", args, {"out": x}),
        ("aten.scaled_dot_product_attention.default", [{"node": "w0"}] * 3, {}),
        ("aten.select.int", [x, 0, big], {}),
    ))  # fmt: skip
    return {"name": "hostile", "target": target, "args": given, "kwargs": {"map": more}}


def tensors(sample: Sample, rng: random.Random, number: int) -> bool:
    """Shapes and types that fit the file but not the model; numbers of weights and predictor."""
    name = rng.choice([name for name in sample.files if name.endswith(".safetensors")])
    header, data = header_of(sample.files[name])
    keys = [key for key in header if key != "__metadata__"]
    entry = header[key := rng.choice(keys)]
    kind = rng.randrange(5)
    shape = entry["shape"]
    if kind == 0:
        entry["shape"] = rng.choice(
            (shape[::-1], [*shape, 1], [1, *shape], [torch.Size(shape).numel()])
        )
    elif kind == 1:
        same = {"F32": "I32", "BF16": "F16", "F16": "BF16", "I32": "F32", "I64": "F64"}
        entry["dtype"] = same.get(entry["dtype"], "F64")
    elif kind == 2:
        header[rng.choice(("keep.head_index", "keep.neuron_count", "x", "../x"))] = header.pop(key)
    elif kind == 3:
        begin, end = entry["data_offsets"]
        kinds = (b"\xff", b"\x7f\x80", b"\x00\xff", b"\x80\x7f\x00\x7f")
        filler = rng.choice(kinds) * (end - begin)
        data = data[:begin] + filler[: end - begin] + data[end:]
    else:
        other = header[rng.choice(keys)]
        entry["shape"], other["shape"] = other["shape"], entry["shape"]
    sample.put(name, with_header(text_of(header), data))
    sample.seal()
    return False


def read_all(artifact: Artifact) -> None:
    """Everything that is read as JSON."""
    describe_artifact(artifact)
    artifact.programs()


#: SHA-256 of the first `masked.json` that was read, which is sound.
_SOUND: list[str] = []


def only_programs(artifact: Artifact) -> Session:
    """As `load_session`, but without a sound `masked`, whose check takes the longest."""
    manifest, listing = artifact.manifest, artifact.path / MANIFEST
    load_target(manifest["target"])
    texts = artifact.programs()
    digest = manifest["files"].get("programs/masked.json", {}).get("sha256")
    _SOUND.extend([] if _SOUND else [digest])
    if digest in _SOUND:
        texts.pop("masked", None)
    programs = {n: Program.from_json(v, f"programs/{n}.json") for n, v in texts.items()}
    shape, length = read_shape(listing, manifest), manifest["max_seq_len"]
    tensors = artifact.tensors()
    check_programs(artifact.path, programs, shape, tensors, length)
    return Session(shape, read_policy(listing, manifest), programs, tensors, {}, length)


def run_steps(artifact: Artifact, batches: Sequence[int] = (2,)) -> None:
    """A prompt and three tokens of so many rows, and what whole sequences run, if it was damaged.

    A program that fails for some rows is tried with the others too.
    """
    session, failed = only_programs(artifact), []
    for rows in batches:
        ids = torch.arange(3 * rows).view(rows, 3) + 5
        try:
            cache = session.new_cache(rows, 8)
            session.step(ids, cache)
            for _ in range(3):
                session.step(ids[:, :1], cache)
            session.step(ids, session.new_cache(rows, 8), program="dense")
            if "masked" in session.programs:
                teacher_forced(session, ids)
        except ShadowcError as error:
            failed.append(error)
    for error in failed:
        raise error


def run_batches(artifact: Artifact) -> None:
    """`run_steps` of one, two and three rows: some programs fit one number alone."""
    run_steps(artifact, (1, 2, 3))


def load_all(artifact: Artifact) -> None:
    """What transformers and tokenizers read, too."""
    load(artifact.path)


#: What is damaged, what is done with what opens nevertheless, cases in CI and in the long run.
KINDS: dict[str, tuple[Damage, Callable[[Artifact], object], int, int]] = {
    "flip": (flip, Artifact.tensors, 2700, 9000),
    "truncate": (truncate, Artifact.tensors, 3700, 16000),
    "manifest": (manifest_values, describe_artifact, 2800, 10000),
    "json": (json_text, read_all, 1300, 5000),
    "headers": (headers, Artifact.tensors, 2400, 9000),
    "index": (index, Artifact.tensors, 700, 2000),
    "paths": (paths, Artifact.tensors, 1400, 4000),
    "hugging-face": (hugging_face, load_all, 800, 4000),
    "report": (report, describe_artifact, 800, 2000),
    "programs": (program, run_batches, 400, 6000),
    "tensors": (tensors, run_steps, 60, 3000),
}

#: What is run names what fails in it: a program, an argument of an operator or of native code.
RUN = dict.fromkeys(("programs", "tensors"), ("program", "shadowc_", "argument", "together"))

# ---------------------------------------------------------------------------- trying them


class _Outside:
    """Notes what this process opens outside of a directory, and what it writes or starts at all."""

    EVENTS = (
        "open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link",
        "os.chmod", "os.truncate", "shutil.rmtree", "subprocess.Popen", "os.system", "os.exec",
        "os.fork", "socket.connect", "os.posix_spawn", "ctypes.dlopen", "os.listdir", "os.scandir",
    )  # fmt: skip

    def __init__(self, root: Path) -> None:
        self.root, self.watching, self.found = str(root), False, []
        self.own = (str(Path(foreign.__file__).parent.parent), sys.prefix, sys.base_prefix, "<")
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching or event not in self.EVENTS:
            return
        path = args[0] if args else None
        path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else path
        writes = event == "open" and isinstance(args[2], int) and args[2] & (
            os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        )  # fmt: skip
        if isinstance(path, str) and event in ("open", "os.scandir", "os.listdir"):
            inside = path == self.root or path.startswith(self.root + "/")
            relative = "/" not in path and path not in ("", ".", "..")  # to a folder that is open
            library = path.startswith(self.own) and not writes
            if ((inside and "/../" not in path) or relative or library) and not writes:
                return
        self.found.append(f"{event} {path}")


@dataclass
class Outcome:
    """What became of a worker's cases."""

    cases: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    memory: int = 0


class _Hang(BaseException):
    pass


def _hang(number: int, frame: Any) -> None:
    raise _Hang


def try_cases(sample: Sample, kind: str, seeds: Sequence[int], outcome: Outcome) -> None:
    """Every case of these seeds, in this process."""
    damage, use, _, _ = KINDS[kind]
    outside = _Outside(sample.root)
    signal.signal(signal.SIGVTALRM, _hang)
    signal.signal(signal.SIGALRM, _hang)
    for seed in seeds:
        rng = random.Random(f"{kind}:{seed}")
        wrong = None
        told = damage(sample, rng, seed)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 30 * SECONDS)  # also what waits
        outside.watching = True
        try:
            use(open_artifact(sample.root))
            if told:
                wrong = "opened, though its hashes tell"
        except ShadowcError as error:
            outcome.refused += 1
            names = (*sample.files, *sample.changed, MANIFEST, *RUN.get(kind, ()))
            if not any(name in error.problem for name in names):
                wrong = f"names no file: {error}"
        except _Hang:
            wrong = "hangs"
        except BaseException:
            wrong = traceback.format_exc(limit=-6)
        finally:
            outside.watching = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        if outside.found:
            wrong = f"{wrong or ''} reached {outside.found}"
            outside.found = []
        if wrong:
            outcome.failures.append(f"{kind}:{seed}: {wrong}")
        outcome.cases += 1
        sample.restore()
    open_artifact(sample.root)  # nothing that a case did has stayed


def _worker(artifact: Path, folder: Path, kind: str, seeds: Sequence[int], pipe: int) -> None:
    """A process of its own: a crash ends it alone, and its memory is measured."""
    outcome = Outcome()
    faulthandler.disable()  # of pytest: a crash is told by the parent
    try:
        sample = Sample.copy(artifact, folder / "artifact")
        (folder / "outside").write_bytes(b"secret")
        use = KINDS[kind][1]
        use(open_artifact(sample.root))  # what a sound one takes does not count
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = size + BASE + (1 << 29)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try_cases(sample, kind, seeds, outcome)
        outcome.memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        allowed = BASE + 3 * sample.size // 2
        if outcome.memory > allowed:
            outcome.failures.append(f"{kind}: {outcome.memory:,} bytes more, allowed {allowed:,}")
    except BaseException:
        outcome.failures.append(f"{kind}: {traceback.format_exc()}")
    with os.fdopen(pipe, "w") as file:
        json.dump(vars(outcome), file)
    os._exit(0)


def run(artifact: Path, kind: str, cases: int, workers: int = 2) -> Outcome:
    """Try so many cases of a kind.

    Args:
        artifact: A sound artifact, which is copied.
        kind: One of `KINDS`.
        cases: How many.
        workers: Processes that share them.
    """
    whole = Outcome()
    with tempfile.TemporaryDirectory() as scratch:
        started = []
        for worker in range(workers):
            folder = Path(scratch, str(worker))
            folder.mkdir()
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reading)
                _worker(artifact, folder, kind, range(worker, cases, workers), writing)
            os.close(writing)
            started.append((child, reading))
        for child, reading in started:
            with os.fdopen(reading) as file:
                text = file.read()
            _, status = os.waitpid(child, 0)
            if not text:
                whole.failures.append(f"{kind}: a worker ended with status {status}: a crash")
                continue
            part = Outcome(**json.loads(text))
            whole.cases += part.cases
            whole.refused += part.refused
            whole.failures += part.failures
            whole.memory = max(whole.memory, part.memory)
    return whole


def main() -> int:
    """The long run: a table, and whether nothing went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--only", choices=[*KINDS])
    parser.add_argument("--artifact", type=Path, help="a small one; else it is compiled")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        artifact = options.artifact or make_artifact(Path(scratch, "sound"))
        print(
            "| kind | cases | refused | crashes, hangs, reads outside, losses | MB more | seconds |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        total, failures = Counter[str](), []
        for kind, (_, _, short, long) in KINDS.items():
            if options.only in (None, kind):
                began = time.monotonic()
                found = run(artifact, kind, long if options.long else short)
                failures += found.failures
                total.update(cases=found.cases, refused=found.refused)
                print(
                    f"| {kind} | {found.cases:,} | {found.refused:,} | {len(found.failures)} | "
                    f"{found.memory / 1e6:.0f} | {time.monotonic() - began:.0f} |", flush=True,
                )  # fmt: skip
        print(f"| all | {total['cases']:,} | {total['refused']:,} | {len(failures)} | | |")
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    return int(bool(failures))


def make_artifact(path: Path, **settings: Any) -> Path:
    """A sound artifact of a Llama so small that its files have 100 KB."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from shadowc.compiler import compile_model
    from shadowc.config import Policy
    from shadowc.models import LoadedModel, ModelSource, model_shape

    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size=len(words), max_position_embeddings=64,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    source = ModelSource(name="tiny", kind="random", path=None, revision=None, fingerprint="tiny")
    loaded = LoadedModel(model, tokenizer, model_shape(config), source)
    policy = Policy(0.25, 0.5, min_neurons=2, refresh=2)
    defaults: dict[str, Any] = {"max_seq_len": 32, "max_shard_size": 8000}
    compile_model(loaded, _calibration(loaded), policy, path, **defaults | settings)
    return path


def _calibration(loaded: Any) -> Any:
    """Of random weights, as tests/conftest.py makes it."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "conftest_of_tests", Path(__file__).parents[1] / "conftest.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.random_calibration(loaded)


if __name__ == "__main__":
    sys.exit(main())
