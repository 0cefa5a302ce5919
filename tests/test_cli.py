"""The command line as a user meets it: what it prints, its exit codes, and every bad input."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM

from shadowc import cli
from shadowc.artifact import open_artifact
from shadowc.calibration import checkpoint
from shadowc.calibration.collect import Collector
from shadowc.calibration.store import load_calibration
from shadowc.errors import CalibrationError, ShadowcError
from shadowc.models import load_model
from shadowc.onnx import library_path

MODEL = "opt-books-15m"
CALIBRATE = ["calibrate", MODEL, "--examples", "6", "--seq-len", "64", "--rank", "16"]
COMPILE = ["compile", "--target", "cpu", "--max-seq-len", "128"]
ENVIRONMENT = {**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}


def shadowc(*arguments, cwd, **options):
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "shadowc", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, **options
    )


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A directory with a calibration and an artifact, made as typed in the documentation."""
    directory = tmp_path_factory.mktemp("work")
    for arguments in ((*CALIBRATE, "--json"), (*COMPILE, "--sparsity", "0.5", "--json")):
        done = shadowc(*arguments, cwd=directory)
        assert done.returncode == 0, done.stderr
        name = f"{arguments[0]}.json"
        (directory / name).write_text(done.stdout)
        (directory / name).with_suffix(".log").write_text(done.stderr)
    return directory


@pytest.fixture
def artifact(work):
    return work / "artifacts" / f"{MODEL}-plainact-s50-cpu"


@pytest.fixture
def calibration(work):
    return work / "calibrations" / f"{MODEL}-plainact"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A directory with an OPT of another shape."""
    directory = tmp_path_factory.mktemp("small") / "small-opt"
    config = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, vocab_size=8192, max_position_embeddings=64,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(directory)
    load_model(MODEL).tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def invoke(capsys, monkeypatch, tmp_path):
    """Run a command in this process, in an empty directory: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["shadowc", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        printed = capsys.readouterr()
        return done.value.code or 0, printed.out, printed.err

    return run


def refused(result, *words):
    """Exit 2, one message, no traceback, nothing on stdout."""
    code, out, err = result
    assert code == 2, err
    assert out == "" and "Traceback" not in err
    assert len(re.findall("^error: ", err, re.MULTILINE)) == 1, err
    for word in words:
        assert word in err, err


def nothing_written(directory, kept=()):
    """No file or directory, hidden ones included, besides `kept`."""
    return {path.name for path in directory.iterdir()} <= set(kept)


# What works --------------------------------------------------------------------------------------


def test_help_is_quick_and_every_command_has_an_example(invoke):
    code, out, _ = invoke("--help")
    assert code == 0
    for name in ("calibrate", "compile", "run", "eval", "bench", "inspect", "targets", "criteria"):
        assert name in out
        code, text, _ = invoke(name, "--help")
        assert code == 0 and "Example: shadowc " + name in text and "--json" in text
    imported = (
        "import sys, shadowc.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_calibrate_and_compile_print_one_json_object(work):
    calibrated = json.loads((work / "calibrate.json").read_text())
    assert calibrated["output"] == f"calibrations/{MODEL}-plainact"
    assert calibrated["examples"] == 6 and calibrated["seconds"] > 0
    assert -1 <= calibrated["spearman_heads"] <= 1 and -1 <= calibrated["spearman_neurons"] <= 1
    compiled = json.loads((work / "compile.json").read_text())
    assert compiled["output"] == f"artifacts/{MODEL}-plainact-s50-cpu"
    assert compiled["target"] == "cpu" and compiled["max_abs_error"] < 0.05
    # By thresholds, on other text than they were calibrated on.
    assert compiled["head_sparsity"] == pytest.approx(0.5, abs=0.1)
    assert compiled["neuron_sparsity"] == pytest.approx(0.5, abs=0.1)
    assert compiled["weight_bytes_skipped"] > 0.3
    assert f"using calibrations/{MODEL}-plainact" in (work / "compile.log").read_text()


def test_run_streams_text_and_the_json_has_the_same(work, artifact, invoke):
    done = shadowc("run", artifact, "--prompt", "It was", "--max-new-tokens", 8, cwd=work)
    assert done.returncode == 0, done.stderr
    code, out, _ = invoke("run", artifact, "--prompt", "It was", "--max-new-tokens", 8, "--json")
    result = json.loads(out)
    assert code == 0 and result["tokens"] == 8 and result["ms_per_token"] > 0
    assert done.stdout.strip() == result["text"].strip()


def test_bench_in_a_process_that_ran_nothing_before(artifact, tmp_path):
    """Nobody else has registered the ops that it knows."""
    copy = shutil.copytree(artifact, tmp_path / "copy")
    sizes = ("--prompt-len", "8", "--new-tokens", "16", "--no-hugging-face")
    done = shadowc("bench", copy, *sizes, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ms_per_token"] > 0


def test_sampling_depends_on_the_seed_only(artifact, invoke):
    def text(seed):
        options = ("--prompt", "It was", "--max-new-tokens", 12, "--temperature", 1.5)
        return json.loads(invoke("run", artifact, *options, "--seed", seed, "--json")[1])["text"]

    assert text(1) == text(1) != text(2)


def test_eval_and_bench_measure_and_keep_a_report(work, artifact, invoke, tmp_path):
    copy = shutil.copytree(artifact, tmp_path / "copy")
    options = ("--tokens", 256, "--seq-len", 64, "--against", "dense,static,random")
    code, out, err = invoke("eval", copy, *options, "--json")
    assert code == 0, err
    quality = json.loads(out)
    assert quality["dense_perplexity"] < quality["perplexity"]
    assert quality["dense_perplexity"] == quality["variants"]["dense"]["perplexity"]
    assert 0.4 < quality["head_sparsity"] < 0.6 and quality["tasks"] == {}
    assert {v["tokens"] for v in quality["variants"].values()} == {quality["tokens"]} == {4 * 62}

    sizes = ("--prompt-len", 8, "--new-tokens", 24, "--no-hugging-face")
    code, out, err = invoke("bench", copy, *sizes, "--json")
    assert code == 0, err
    speed = json.loads(out)
    assert speed["speedup"] == pytest.approx(speed["dense_ms_per_token"] / speed["ms_per_token"])
    assert 0 < speed["bytes_per_token"] < speed["dense_bytes_per_token"]
    assert speed["bandwidth_share"] > 0 and speed["device"] and speed["threads"] >= 1
    assert speed["hugging_face_ms_per_token"] is None and "hugging_face" in speed["left_out"]

    assert set(speed["variants"]) == {"artifact", "dense", "exact"}
    assert speed["policy_in_effect"] == "sparse" and speed["static_ms_per_token"] is None

    names = ("--against", "static,dejavu", "--batch", 2)
    code, out, err = invoke("bench", copy, *sizes, *names, "--json")
    assert code == 0, err
    speed = json.loads(out)
    own, static, dejavu = (speed["variants"][k] for k in ("artifact", "static", "dejavu"))
    assert set(speed["variants"]) == {"artifact", "dense", "static", "dejavu"}
    assert speed["left_out"] == {} and speed["exact_ms_per_token"] is None
    assert static["ms_per_step"] == speed["static_ms_per_token"]
    assert dejavu["ms_per_step"] == speed["dejavu_ms_per_token"] and dejavu["random_weights"]
    assert own["bytes"] == speed["bytes_per_token"] and not own["random_weights"]
    assert static["bytes"] < own["bytes"] < dejavu["bytes"]  # no predictor, one, one a block
    assert static["beside_artifact"] == static["ms_per_step"] / speed["ms_per_token"]
    assert speed["ms_per_step"] == 2 * speed["ms_per_generated_token"] == speed["ms_per_token"]
    assert speed["neurons_read_share"] == pytest.approx(0.5, abs=0.1)
    code, out, _ = invoke("bench", copy, *sizes, *names)
    for word in ("a step gives 2 tokens", "dejavu (random, speed only)", "static (mean scores)"):
        assert word in out

    report = json.loads((copy / "report.json").read_text())
    assert {"compile", "eval", "bench"} <= set(report)
    assert "<svg" in (copy / "report.html").read_text()
    assert "DejaVu" in (copy / "report.html").read_text()
    assert invoke("inspect", copy)[0] == 0  # the hashes are those of the new report


def write_questions(path, count):
    """PIQA's fields."""
    row = {"sol1": "the sea", "sol2": "a ship"}
    rows = ({"goal": f"Day {i}", **row, "label": i % 2} for i in range(count))
    path.write_text("\n".join(map(json.dumps, rows)))


def test_eval_with_overlap_shots_and_generation(artifact, invoke, tmp_path):
    copy = shutil.copytree(artifact, tmp_path / "copy")
    write_questions(tmp_path / "piqa.jsonl", 16)
    options = ("--tokens", 128, "--seq-len", 64, "--stride", 32, "--generate", 4)
    tasks = ("--tasks", "piqa:piqa.jsonl", "--num-fewshot", 2)
    code, out, err = invoke("eval", copy, *options, *tasks, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["tokens"] == 62 + 2 * 32 and found["stride"] == 32
    assert found["dense_word_perplexity"] < found["word_perplexity"]
    assert found["variants"]["dense"]["word_perplexity"] == found["dense_word_perplexity"]
    assert found["tasks"]["piqa:piqa.jsonl"]["questions"] == 4 and found["num_fewshot"] == 2
    assert found["generation"]["new_tokens"] == 4 and 0 <= found["generation"]["equal_tokens"] <= 1
    out = invoke("eval", copy, *options, *tasks)[1]
    for word in ("word perplexity", "4 questions, 2 shots", "4 tokens generated after each of 3"):
        assert word in out
    assert "word perplexity" in (copy / "report.html").read_text()
    refused(invoke("eval", copy, *options[:4], "--stride", 64), "--stride from 1 to 63")
    refused(invoke("eval", copy, *options[:4], "--generate", 128), "--generate", "127")
    refused(invoke("eval", copy, *options[:4], *tasks[:2], "--num-fewshot", 13), "--num-fewshot 12")


def test_the_harness_command_line_knows_artifacts(artifact, invoke, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_questions(tmp_path / "piqa.jsonl", 8)
    shutil.copy(Path(__file__).parents[1] / "examples" / "piqa_file.yaml", tmp_path)
    options = ("--tasks", "piqa_file", "--include_path", ".", "--output_path", "found")
    code, out, err = invoke(
        "lm-eval", "--model", "shadowc", "--model_args", f"artifact={artifact}", *options
    )
    assert code == 0, err
    assert "piqa_file" in out
    (file,) = (tmp_path / "found").rglob("results*.json")
    found = json.loads(file.read_text())
    assert found["results"]["piqa_file"]["acc,none"] in [i / 8 for i in range(9)]
    assert found["n-samples"]["piqa_file"]["effective"] == 8
    gone = ("lm-eval", "--model", "shadowc", "--model_args", "artifact=gone", *options)
    refused(invoke(*gone), "not an artifact")
    assert "--model_args" in invoke("lm-eval", "run", "--help")[1]


def test_the_harness_is_named_where_it_is_missing(artifact, invoke, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "shadowc.evaluation.lm_eval", raising=False)
    refused(invoke("lm-eval", "ls", "tasks"), "shadowc[eval]")
    sizes = ("--tokens", 64, "--seq-len", 32)
    refused(invoke("eval", artifact, *sizes, "--harness", "--tasks", "piqa"), "shadowc[eval]")


def test_predictors_at_several_layers_from_calibration_to_measurement(invoke, tmp_path):
    """A tap at every fifth layer and at every layer, each in directories of its own."""
    for option, kind, taps in (
        (("--taps", 5), "-taps5", [0, 5]),
        (("--feature", "normed"), "", [*range(10)]),
    ):
        code, out, err = invoke(*CALIBRATE, *option, "--json")
        assert code == 0, err
        calibration = json.loads(out)["output"]
        assert calibration == f"calibrations/{MODEL}-plainact{kind}"
        assert json.loads(invoke("inspect", calibration, "--json")[1])["taps"] == taps
        refused(invoke(*COMPILE, calibration, "--selection", "topk"), "--selection threshold")
        code, out, err = invoke(*COMPILE, calibration, "--json")
        assert code == 0, err
        artifact = json.loads(out)["output"]
        assert artifact == f"artifacts/{MODEL}-plainact{kind}-s50-cpu"
        described = json.loads(invoke("inspect", artifact, "--json")[1])
        assert described["selection"] == "threshold" and described["taps"] == taps
        sizes = ("--tokens", 256, "--seq-len", 64)
        code, out, err = invoke("eval", artifact, *sizes, "--against", "dense,static", "--json")
        assert code == 0, err
        quality = json.loads(out)
        assert 0.2 < quality["neuron_sparsity"] < 0.8 and 0.2 < quality["head_sparsity"] < 0.8
        assert quality["variants"]["static"]["neuron_sparsity"] == pytest.approx(0.5, abs=0.01)
        sizes = ("--prompt-len", 8, "--new-tokens", 16, "--no-hugging-face")
        code, out, err = invoke("bench", artifact, *sizes, "--against", "static,dejavu", "--json")
        assert code == 0, err
        assert json.loads(out)["selection_ms"] > 0


def test_a_threshold_for_one_predictor(invoke):
    code, out, err = invoke(*CALIBRATE, "--predictor", "shadow", "--json")
    assert code == 0, err
    calibration = json.loads(out)["output"]
    assert calibration == f"calibrations/{MODEL}-plainact-shadow"
    options = ("--selection", "threshold", "--head-sparsity", 0.2, "--neuron-sparsity", 0.5)
    code, out, err = invoke(*COMPILE, calibration, *options, "--json")
    assert code == 0, err
    assert json.loads(out)["output"].endswith("-h20-n50-threshold-cpu")
    refused(invoke(*COMPILE, calibration, "--selection", "best"), "topk, threshold")
    static = ("--predictor", "static", "--selection", "threshold")
    refused(invoke(*COMPILE, calibration, *static), "fixed scores need no threshold")


def test_onnx_from_compile_to_bench(invoke, calibration):
    code, out, err = invoke("compile", calibration, "--target", "onnx-cpu", "--max-seq-len", "128",
                            "--output", "onnx", "--json")  # fmt: skip
    assert code == 0, err
    compiled = json.loads(out)
    assert compiled["greedy_tokens"] == compiled["greedy_tokens_equal"] == 64
    code, out, _ = invoke("run", "onnx", "--prompt", "It was", "--max-new-tokens", "8", "--json")
    assert code == 0 and json.loads(out)["tokens"] == 8
    code, out, _ = invoke("bench", "onnx", "--prompt-len", "16", "--new-tokens", "24",
                          "--no-hugging-face", "--json")  # fmt: skip
    found = json.loads(out)
    assert found["policy_in_effect"] == "sparse" and found["dense_ms_per_token"] > 0
    assert found["weight_bytes_skipped"] == pytest.approx(compiled["weight_bytes_skipped"], abs=0.1)
    refused(invoke("compile", calibration, "--target", "onnx-cpu", "--refresh", "prompt"),
            "from one token to the next", "--refresh token")  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine with no GPU")
def test_onnx_cuda_without_a_gpu(invoke, calibration, work):
    """Compiled and checked by its functions; what runs it here are they, or the CPU's kernels."""
    directory = work / "onnx-cuda"
    options = ("compile", calibration, "--target", "onnx-cuda", "--max-seq-len", "128")
    refused(invoke(*options, "--dtype", "bf16"), "has no bf16", "--dtype fp16")
    refused(invoke(*options, "--dtype", "fp16", "--dense-from-batch", "4"), "are for one row")
    # Triton's compiler cannot share a process with its interpreter.
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "shadowc", *options, "--dtype", "fp16", "--sparsity", "0.5",
               "--output", directory, "--json"]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert compiled["checked_on"] == "cpu"
    assert compiled["greedy_tokens"] == compiled["greedy_tokens_equal"] == 64
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    (branching,) = [n for n in model.graph.node if n.op_type == "If"]
    (kernels,) = [t for a in branching.attribute for t in a.g.initializer]
    families, found, place = struct.unpack_from("<q", kernels.raw_data, 40)[0], [], 48
    for _ in range(families):
        arch, size = struct.unpack_from("<2q", kernels.raw_data, place)
        found.append(arch)
        place += 16 + size
    assert found == [80, 89, 90] and place == len(kernels.raw_data)
    example = Path(__file__).parents[1] / "examples" / "onnx_plain.py"
    said = [
        subprocess.run([sys.executable, example, directory, "11,29,5,303", *library],
                       capture_output=True, text=True, check=True).stdout
        for library in ((), (library_path(),))
    ]  # fmt: skip
    assert said[0] == said[1] and said[0].count(",") == 31
    refused(invoke("run", directory, "--prompt", "It was"), "ONNX Runtime cannot use a GPU here")


def test_inspect_says_what_a_directory_is(artifact, calibration, invoke):
    code, out, _ = invoke("inspect", artifact, "--json")
    found = json.loads(out)
    assert code == 0 and found["kind"] == "artifact" and found["model"] == MODEL
    assert found["lazy_kv"] is False
    assert len(found["layers"]) == 10 and found["files_verified"] > 5
    code, out, _ = invoke("inspect", calibration, "--json")
    assert code == 0 and json.loads(out)["kind"] == "calibration"


def test_targets_and_criteria(invoke):
    assert "cpu" in [t["target"] for t in json.loads(invoke("targets", "--json")[1])["targets"]]
    known = {c["criterion"]: c for c in json.loads(invoke("criteria", "--json")[1])["criteria"]}
    assert {"plainact", "l2norm", "sens", "random"} <= set(known)
    assert known["snip"]["of"] == "tokens" and known["jacov"]["of"] == "all data"


def test_sparsity_0_needs_no_calibration_and_other_names_tell_policies_apart(small_model, invoke):
    code, out, err = invoke("compile", "--model", small_model, "--sparsity", 0, "--json")
    assert code == 0, err
    assert json.loads(out)["output"] == "artifacts/small-opt-s00-cpu"
    policy = cli._policy(None, 0.25, 0.5, "units", "local", "prompt")
    assert cli._policy_name(policy, "units", None) == ["h25-n50", "local", "prompt"]
    assert cli._policy_name(cli._policy(0.3, None, None, "bytes", "global", "4"), "bytes", 0.3) == [
        "b30", "every4"
    ]  # fmt: skip


# Bad input ---------------------------------------------------------------------------------------


def test_unknown_names(invoke, calibration, tmp_path):
    refused(invoke("calibrate", "opt-book"), "unknown model 'opt-book'", "opt-books-15m")
    refused(invoke(*CALIBRATE, "--criterion", "magic"), "unknown criterion 'magic'", "plainact")
    refused(invoke(*CALIBRATE, "--data", "wiki"), "unknown data set 'wiki'")
    refused(invoke("compile", calibration, "--target", "abacus"), "unknown target 'abacus'", "cpu")
    refused(invoke("compile", calibration, "--lazy-kv"), "'cpu' has no lazy keys", "CUDA target")
    refused(invoke("compile", calibration, "--dtype", "int4"), "unknown dtype", "bf16")
    bound = ("compile", calibration, "--max-ppl-increase")
    refused(invoke(*bound, "little"), "not a share", "2%")
    refused(invoke(*bound, "2%", "--sparsity", "0.5"), "excludes --sparsity", "one way")
    refused(invoke(*bound, "2%", "--scope", "local"), "share for each layer", "--scope local")
    both = ("--budget", "bytes", "--selection", "topk")
    refused(invoke("compile", calibration, *both), "share for each layer", "--selection topk")
    refused(invoke("compile", calibration, "--refresh", "never"), "refresh 'never'", "token")
    refused(invoke("compile"), "no calibration", "shadowc calibrate")
    refused(invoke("compile", calibration, "--dense-from-batch", 8), "cpu target", "CUDA")
    assert nothing_written(tmp_path)


def test_usage_errors_exit_2(invoke):
    code, _, err = invoke("run", "somewhere")
    assert code == 2 and "--prompt" in err
    assert invoke("frobnicate")[0] == 2


def test_an_unsupported_architecture_is_named(invoke, tmp_path):
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "config.json").write_text(
        '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
    )
    refused(invoke("calibrate", gpt2), "GPT2LMHeadModel", "OPT", "Llama")


@pytest.mark.parametrize("value", ["1", "1.5", "-0.1", "nan"])
def test_sparsity_out_of_range(invoke, calibration, value, tmp_path):
    refused(invoke("compile", calibration, f"--sparsity={value}"), "out of range", "[0, 1)")
    assert nothing_written(tmp_path)


def test_sparsities_that_exclude_each_other(invoke, calibration):
    both = ("--sparsity", 0.5, "--head-sparsity", 0.1)
    refused(invoke("compile", calibration, *both), "--head-sparsity", "--sparsity")


def test_empty_or_short_text(invoke, tmp_path):
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("It was late. ")
    refused(invoke(*CALIBRATE, "--data", empty), "empty.txt")
    refused(invoke(*CALIBRATE, "--data", short), "short.txt", "too short")
    assert nothing_written(tmp_path, {"empty.txt", "short.txt"})


def test_a_calibration_of_another_model(invoke, calibration, small_model, tmp_path):
    refused(invoke("compile", calibration, "--model", small_model), "another shape")
    other = shutil.copytree(calibration, tmp_path / "other")
    header = json.loads((other / "calibration.json").read_text())
    header["model"]["fingerprint"] = "0" * 64
    (other / "calibration.json").write_text(json.dumps(header))
    refused(invoke("compile", other), "other weights")
    assert nothing_written(tmp_path, {"other"})


def test_a_damaged_calibration(invoke, calibration, tmp_path):
    copy = shutil.copytree(calibration, tmp_path / "copy")
    tensors = copy / "calibration.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    refused(invoke("compile", copy), "calibration.safetensors")
    refused(invoke("inspect", copy), "calibration.safetensors")


@pytest.mark.parametrize("damage", ["missing", "truncated", "edited", "foreign"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "predictor.safetensors", "programs/decode.json", "manifest.json"]
)
def test_a_damaged_artifact_names_the_file(invoke, artifact, tmp_path, damage, name):
    copy = shutil.copytree(artifact, tmp_path / "copy", copy_function=os.link)
    path = copy / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "edited":
        content[len(content) // 2] ^= 1
        if name == "manifest.json":
            content = bytearray(bytes(content).replace(b'"schema": 2', b'"schema": 9'))
        path.write_bytes(content)
    elif damage == "foreign":
        path.write_text('{"something": "else"}')
    refused(invoke("run", copy, "--prompt", "x"), name)


def test_neither_artifact_nor_calibration(invoke, tmp_path):
    refused(invoke("inspect", tmp_path), "neither an artifact nor a calibration")
    refused(invoke("run", tmp_path / "gone", "--prompt", "x"), "not an artifact")


def test_too_long_a_prompt_or_generation(invoke, artifact):
    long = ("--prompt", "It was", "--max-new-tokens", 1000)
    refused(invoke("run", artifact, *long), "compiled length", "128")
    sizes = ("--prompt-len", 100, "--new-tokens", 100)
    refused(invoke("bench", artifact, *sizes), "compiled length", "128")


def test_what_an_artifact_cannot_be_compared_with(invoke, artifact):
    refused(invoke("eval", artifact, "--against", "magic"), "magic", "static")
    refused(invoke("bench", artifact, "--against", "magic"), "magic", "dejavu, hf, hf-compiled")
    refused(invoke("bench", artifact, "--no-hugging-face", "--against", "hf"), "--against hf")
    refused(invoke("eval", artifact, "--data", "nowhere.txt"), "nowhere.txt")
    refused(invoke("eval", artifact, "--tasks", "chess", "--tokens", 64, "--seq-len", 32), "chess")


def test_an_output_that_cannot_be_written(invoke, calibration, tmp_path):
    (tmp_path / "file").write_text("mine")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for output in ("file/below", "file", "mine"):
        refused(invoke("compile", calibration, "--output", output), output.split("/")[0])
        refused(invoke(*CALIBRATE, "--output", output), output.split("/")[0])
    assert (tmp_path / "file").read_text() == (mine / "notes.txt").read_text() == "mine"
    assert nothing_written(tmp_path, {"file", "mine"})


def _small_files(limit=1 << 12):
    """What a full disk does to a write: the limit's signal is ignored, so that write fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.parametrize("name", ["calibrate", "compile"])
def test_a_full_disk(name, small_model, tmp_path):
    arguments = ["calibrate", small_model, "--examples", 4, "--seq-len", 16, "--rank", 4]
    if name == "compile":
        arguments = ["compile", "--model", small_model, "--sparsity", 0]
    done = shadowc(*arguments, "--output", "out", cwd=tmp_path, preexec_fn=_small_files)
    refused((done.returncode, done.stdout, done.stderr), "out", "space")
    assert nothing_written(tmp_path)


def test_a_disk_that_is_full_in_the_middle_of_a_shard(tmp_path):
    limit = 8_000_000  # more than the tokenizer needs, less than the second shard
    arguments = ["compile", "--model", MODEL, "--sparsity", 0, "--max-shard-size", "10MB"]
    done = shadowc(*arguments, "--output", "out", cwd=tmp_path, preexec_fn=lambda:
                   _small_files(limit))  # fmt: skip
    refused((done.returncode, done.stdout, done.stderr), "out", "space", "File too large")
    assert "written" in done.stderr or "compiling" in done.stderr
    assert nothing_written(tmp_path)


def test_a_disk_that_is_too_small(invoke, tmp_path, monkeypatch):
    """It is refused before anything is written, with the sizes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 20 << 20))
    compiling = ("compile", "--model", MODEL, "--sparsity", 0, "--json")
    refused(invoke(*compiling), "does not fit on the disk", "(0.0475 GB)", "20,971,520", "--output")
    assert nothing_written(tmp_path)


@pytest.mark.parametrize("size", ["0", "-1GB", "5 apples", "", "GB"])
def test_a_shard_size_that_is_none(size, invoke):
    refused(invoke("compile", "--max-shard-size", size), "--max-shard-size", "5GB")


def test_shard_sizes():
    sizes = {"5GB": 5 * 10**9, "500 mb": 5 * 10**8, "2GiB": 2**31, "1.5KB": 1500, "70": 70}
    assert {text: cli._bytes("--max-shard-size", text) for text in sizes} == sizes


def test_compile_writes_shards(work, invoke, artifact, calibration, tmp_path):
    """With lines of progress on stderr, and the weights of the artifact in one file."""
    sharded = (*COMPILE, calibration, "--max-shard-size", "10MB", "--output", "out", "--json")
    code, out, err = invoke(*sharded)
    assert code == 0 and json.loads(out)["output"] == "out", err
    assert re.search(r"^(0\.0\d) of \1 GB written, \d+ s$", err, re.MULTILINE)
    assert len(list((tmp_path / "out").glob("model-0000?-of-0000?.safetensors"))) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    whole, shards = open_artifact(artifact).tensors(), open_artifact(tmp_path / "out").tensors()
    assert whole.keys() == shards.keys() >= index["weight_map"].keys()
    assert all(whole[name].equal(value) for name, value in shards.items())


def _heed_ctrl_c():
    """A shell makes its background jobs ignore the signal, and what they start inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("name", ["calibrate", "compile"])
def test_ctrl_c(name, calibration, tmp_path):
    arguments = ["calibrate", MODEL, "--examples", "200"]
    if name == "compile":
        arguments = ["compile", calibration]
    command = [sys.executable, "-m", "shadowc", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=_heed_ctrl_c,
    )  # fmt: skip
    log = ""
    while (line := process.stderr.readline()) and "compiling" not in line:
        log += line
        if name == "calibrate" and "loading" in line:
            break
    time.sleep(4 if name == "calibrate" else 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, log + err
    assert out == "" and "Traceback" not in err and err.count("interrupted") == 1
    assert not any(Path(tmp_path).rglob("*.json"))
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("error", [RuntimeError, ShadowcError])
def test_ctrl_c_that_a_library_makes_another_error_of(error, invoke, monkeypatch):
    def load():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as interrupt:
            raise error("could not import the module") from interrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cli, "_newest_calibration", load)
    monkeypatch.setattr(os, "_exit", sys.exit)
    try:
        code, out, err = invoke("compile")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and out == ""
    assert err.count("interrupted") == 1 and "error:" not in err and "Traceback" not in err


def sweeping(calibration, output, *more):
    """A short sweep's command line."""
    sparsities = ("--sparsities", "0.6,0.3", "--tokens", "300", "--seq-len", "64")
    return ["eval", calibration, *sparsities, "--output", output, *more]


def test_eval_of_a_calibration_is_a_sweep(calibration, tmp_path, invoke):
    output = tmp_path / "out"
    command = sweeping(calibration, output, "--against", "dense,static", "--neurons-only")
    code, text, _ = invoke(*command, "--json")
    assert code == 0
    result = json.loads(text)
    assert list(result["methods"]) == ["layerwise", "dense", "static"]
    assert [point["sparsity"] for point in result["methods"]["static"]] == [0.3, 0.6]
    report = json.loads((output / "report.json").read_text())
    assert report == {k: v for k, v in result.items() if k not in ("output", "seconds")}
    assert "</html>" in (output / "report.html").read_text()
    code, text, _ = invoke(*command)  # measured already
    assert code == 0 and "sparsity of neurons" in text and "report.html" in text
    code, _, error = invoke(*sweeping(calibration, output, "--against", "dense,static"))
    assert code == 2 and "another neurons_only" in error and "--fresh" in error


@pytest.mark.parametrize(
    "options",
    [("--sparsities", "0.5,x"), ("--sparsities", "1.5"), ("--against", "magic"),
     ("--tasks", "copa")],
)  # fmt: skip
def test_a_sweep_refuses_what_it_cannot_measure(calibration, tmp_path, invoke, options):
    code, _, error = invoke("eval", calibration, "--output", tmp_path / "out", *options)
    assert code == 2 and error.startswith("loading") and "error:" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [("--sparsities", "0.5"), ("--neurons-only",), ("--fresh",)])
def test_an_artifact_has_no_sweep(artifact, invoke, option):
    code, _, error = invoke("eval", artifact, *option)
    assert code == 2 and "those of a sweep" in error


def test_an_interrupted_sweep_says_how_to_go_on(calibration, tmp_path):
    output = tmp_path / "out"
    command = sweeping(calibration, output, "--fresh", "--tokens", "30000")
    process = subprocess.Popen(
        [sys.executable, "-m", "shadowc", *map(str, command)],
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_ctrl_c,
    )  # fmt: skip
    state, limit = output / "state.jsonl", time.monotonic() + 120
    while time.monotonic() < limit and not (state.exists() and len(state.read_text()) > 2000):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert f"to go on: shadowc eval {calibration}" in error and "--fresh" not in error
    assert not (output / "report.json").exists() and state.exists()


def test_masks_are_refreshed_as_calibrated_unless_said_otherwise(invoke, small_model):
    options = ("--examples", 6, "--seq-len", 16, "--refresh", "prompt", "--fit", "ridge")
    code, out, err = invoke("calibrate", small_model, *options, "--json")
    assert code == 0, err
    made = Path(json.loads(out)["output"])
    assert made.name.endswith("-plainact-prompt")
    assert load_calibration(made).refresh == 0
    for asked, expected in (((), 0), (("--refresh", "4"), 4)):
        code, out, err = invoke(
            "compile", made, "--dtype", "fp32", "--sparsity", 0.25, *asked, "--json"
        )
        assert code == 0, err
        assert open_artifact(json.loads(out)["output"]).manifest["policy"]["refresh"] == expected


def test_a_calibration_goes_on_only_as_it_began(invoke, small_model, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 1)
    options = ("calibrate", small_model, "--examples", 24, "--seq-len", 64, "--output", "c")
    run = Collector.run

    def interrupted(collector, group, seed):
        if Path(".c.unfinished").exists():
            raise CalibrationError("stopped")
        return run(collector, group, seed)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "run", interrupted)
        code, _, err = invoke(*options)
        assert code == 2 and "stopped" in err and Path(".c.unfinished").exists()
    code, _, err = invoke(*options, "--seed", 1)
    assert code == 2 and "another" in err and "seed" in err and "--fresh" in err
    code, _, err = invoke(*options)
    assert code == 0 and "going on with the calibration" in err, err
    assert Path("c").exists() and not Path(".c.unfinished").exists()


def _edit(directory, change):
    """Rewrite a checkpoint's tensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def _nan(directory):
    def change(tensors):
        tensors["model.decoder.layers.1.fc1.weight"][2, 3] = float("nan")

    _edit(directory, change)


def _integers(directory):
    def change(tensors):
        name = "model.decoder.layers.0.fc1.weight"
        tensors[name] = (tensors[name] * 100).to(torch.int8)

    _edit(directory, change)


def _lost_shard(directory):
    model = OPTForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="200KB")
    next(iter(sorted(directory.glob("model-*.safetensors")))).unlink()


def _outside(directory):
    index = {"weight_map": {"model.decoder.embed_tokens.weight": "../model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _small_vocabulary(directory):
    def change(tensors):
        for name in ("model.decoder.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                tensors[name] = tensors[name][:100].clone()

    _edit(directory, change)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_lost_shard, ("model-00001-of-", "an index that names it")),
        (_outside, ("names a file outside", "../model.safetensors")),
        (_integers, ("model.decoder.layers.0.fc1.weight", "I8", "fp32, bf16 or fp16")),
        (_nan, ("model.decoder.layers.1.fc1.weight", "NaN")),
        (_small_vocabulary, ("tokenizer", "does not belong", "8192")),
    ],
)
def test_calibrate_refuses_a_damaged_checkpoint(invoke, small_model, tmp_path, damage, words):
    directory = tmp_path / "damaged"
    shutil.copytree(small_model, directory)
    damage(directory)
    arguments = ("calibrate", directory, "--examples", "4", "--seq-len", "16")
    refused(invoke(*arguments), *words)
    assert nothing_written(tmp_path, kept=("damaged",))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("empty.txt", "", ("holds no text",)),
        ("blank.jsonl", '{"text": ""}\n{"text": " "}\n', ("holds no text",)),
        ("short.txt", "a few words", ("too short to calibrate on", "--seq-len")),
        ("broken.jsonl", '{"text": "all is well"}\n{"text": \n', ("broken.jsonl", "line 2")),
    ],
)
def test_calibrate_refuses_text_that_holds_nothing(
    invoke, small_model, tmp_path, name, text, words
):
    (tmp_path / name).write_text(text)
    arguments = ("calibrate", small_model, "--data", name, "--examples", "4", "--seq-len", "16")
    refused(invoke(*arguments), *words)
    assert nothing_written(tmp_path, kept=(name,))


def test_questions_that_are_too_long_are_left_out(invoke, small_model, tmp_path):
    """The rest is enough, or the message says how many there are."""
    long = " ".join(["word"] * 80)
    rows = [
        {"goal": long if i % 2 else "To sit", "sol1": "a chair", "sol2": "a sea", "label": 0}
        for i in range(16)
    ]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("calibrate", small_model, "--data", "piqa:piqa.jsonl", "--seq-len", "32")
    code, _, err = invoke(*arguments, "--examples", "4")
    assert code == 0, err
    refused(invoke(*arguments, "--examples", "12", "--output", "more"), "at most 32 tokens")


def test_memory_that_does_not_suffice_is_tried_smaller(small_model, tmp_path):
    """A batch of 1,000 sequences needs more than the process may have; one of fewer does not."""
    code = (
        "import resource, sys\n"
        "from shadowc.models import load_model\n"
        "from shadowc.calibration.data import Example\n"
        "from shadowc.calibration import batches, fit\n"
        "loaded = load_model(sys.argv[1])\n"
        "ids = [[5 + (i * j) % 900 for j in range(32)] for i in range(1150)]\n"
        "rows = [Example(row, [True] * 32) for row in ids]\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "limit = used + int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "tried, smaller = [], batches.Plan.smaller\n"
        "batches.Plan.smaller = lambda *a: tried.append(a[0].tokens) or smaller(*a)\n"
        "(found,) = fit.calibrate(loaded, rows, fit.FitOptions(rank=4, batch_tokens=1 << 15))\n"
        "print(found.examples, tried)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(small_model), str(150 << 20)],
        capture_output=True, text=True,
        # A thread's arena takes 64 MiB of room, and what is freed in pieces cannot be had whole.
        env=ENVIRONMENT | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1150 [32768")
