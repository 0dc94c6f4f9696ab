"""Authors' checkpoints in every form, and one line for each way in which they can be wrong."""

import hashlib
import json
import pickle
import random
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from stethoscope.adapters.authors import checkpoints
from stethoscope.adapters.fingerprint import digest_files
from stethoscope.adapters.load_settings import Loading
from stethoscope.core.errors import ConfigError, DataError

WEIGHTS = {
    "a.one": torch.arange(6.0).view(2, 3),
    "a.two": torch.ones(2),
    "b.one": torch.full((3,), 2, dtype=torch.int64),
}
OFFLINE = Loading(local_files_only=True)


def read(source, *only, loading=OFFLINE):
    return checkpoints.read_weights(str(source), loading, only, "projector")


def check(weights, names=tuple(WEIGHTS)):
    assert sorted(weights) == sorted(names)
    for name in names:
        assert torch.equal(weights[name].tensor, WEIGHTS[name])
        assert weights[name].key == name


def sharded(folder, kind):
    """The weights in two shards with an index; ``a`` in the first, ``b`` in the second."""
    stem, index = {
        "safetensors": ("model-{}-of-2.safetensors", "model.safetensors.index.json"),
        "bin": ("pytorch_model-{}-of-2.bin", "pytorch_model.bin.index.json"),
    }[kind]
    folder.mkdir(parents=True, exist_ok=True)
    for number, letter in ((1, "a"), (2, "b")):
        shard = {name: tensor for name, tensor in WEIGHTS.items() if name.startswith(letter)}
        save = save_file if kind == "safetensors" else torch.save
        save(shard, folder / stem.format(number))
    places = {name: stem.format("ab".index(name[0]) + 1) for name in WEIGHTS}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return [folder / stem.format(number) for number in (1, 2)]


@pytest.mark.parametrize("inside", [None, "model", "state_dict", "module"])
@pytest.mark.parametrize("old", [False, True])
def test_files_of_torch(tmp_path, inside, old):
    held = WEIGHTS if inside is None else {inside: WEIGHTS, "epoch": 3, "optimizer": {"lr": 0.1}}
    path = tmp_path / "checkpoint.pth"
    torch.save(held, path, _use_new_zipfile_serialization=not old)
    weights = read(path)
    check(weights)
    assert weights["a.one"].file == path


def test_safetensors_and_prefixes(tmp_path):
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    check(read(tmp_path / "weights.safetensors"))
    check(read(tmp_path / "weights.safetensors", "a."), ("a.one", "a.two"))
    check(read(tmp_path), tuple(WEIGHTS))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_of_shards_only_those_that_are_needed_are_opened(tmp_path, kind):
    _, second = sharded(tmp_path, kind)
    check(read(tmp_path))
    second.write_bytes(b"no checkpoint")
    check(read(tmp_path, "a."), ("a.one", "a.two"))
    with pytest.raises(DataError, match=second.name):
        read(tmp_path, "b.")
    second.unlink()
    with pytest.raises(DataError, match=second.name):
        read(tmp_path)


def test_without_an_index_all_files_of_a_folder(tmp_path):
    for name, tensor in WEIGHTS.items():
        torch.save({name: tensor}, tmp_path / f"part-{name}.bin")
    check(read(tmp_path))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with two commits of owner/name: the second, a tag, has one weight only."""
    root = tmp_path / "models--owner--name"
    sharded(root / "snapshots" / "c0ffee", "safetensors")
    (root / "snapshots" / "decaf").mkdir()
    torch.save({"a.two": WEIGHTS["a.two"]}, root / "snapshots" / "decaf" / "other.pth")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("c0ffee")
    (root / "refs" / "small").write_text("decaf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return root


def test_hub_models_by_revision_and_file(hub):
    check(read("owner/name"))
    check(read("owner/name", "b."), ("b.one",))
    check(read("owner/name@small:other.pth"), ("a.two",))
    check(read("owner/name:other.pth", loading=Loading(local_files_only=True, revision="small")), ("a.two",))
    with pytest.raises(ConfigError, match=r"other\.pth"):
        read("owner/name:other.pth")
    with pytest.raises(ConfigError, match="owner/name@small"):
        read("owner/name@small")
    with pytest.raises(ConfigError, match="owner/missing"):
        read("owner/missing")


def test_of_a_hub_model_missing_shards_are_not_asked_for(hub):
    (hub / "snapshots" / "c0ffee" / "model-2-of-2.safetensors").unlink()
    check(read("owner/name", "a."), ("a.one", "a.two"))


@pytest.mark.parametrize("source", ["/no/such/file.pth", "./nor/here", "file.pth", "folder/file.bin", "word"])
def test_what_is_not_there(source):
    with pytest.raises(ConfigError, match=f"projector={source}") as caught:
        read(source)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def damaged(path, content):
    if content == "code":
        torch.save({"model": WEIGHTS, "extra": Evil()}, path)
    elif content == "bare code":
        path.write_bytes(pickle.dumps(Evil()))
    elif content == "cut":
        torch.save(WEIGHTS, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif content == "cut safetensors":
        save_file(WEIGHTS, path)
        path.write_bytes(path.read_bytes()[:-1])
    elif content == "no tensors":
        torch.save({"lr": 0.1, "epoch": 3}, path)
    elif content == "a list":
        torch.save([1, 2], path)
    elif content == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1")
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.pth", "code"), ("x.pth", "bare code"), ("x.pth", "cut"), ("x.pth", "no tensors"), ("x.pth", "a list"),
        ("x.pth", "text"), ("x.pth", "nothing"), ("x.safetensors", "cut safetensors"), ("x.safetensors", "text"),
        ("x.safetensors", "nothing"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path, capsys, name, content):
    damaged(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    text = str(caught.value)
    assert "\n" not in text
    assert str(tmp_path / name) in text
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize("old", [True, False])
def test_broken_bytes_of_torch_are_one_line(tmp_path, old):
    """Files from before torch 1.6 have no check sum, so their reader follows broken bytes into any error."""
    torch.save({"model": WEIGHTS}, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
    whole, rng, messages = (tmp_path / "x.pth").read_bytes(), random.Random(0), set()
    for _ in range(150):
        broken = bytearray(whole)
        broken[rng.randrange(min(len(broken), 400))] = rng.randrange(256)
        (tmp_path / "x.pth").write_bytes(broken)
        try:
            read(tmp_path / "x.pth")
        except DataError as error:
            messages.add(str(error))
    assert not any("\n" in message for message in messages)
    assert not old or len(messages) > 5


def test_no_name_that_was_wanted(tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.pth")
    with pytest.raises(DataError, match=r"x\.pth.*llama_proj\."):
        read(tmp_path / "x.pth", "llama_proj.")


def test_an_index_that_is_none(tmp_path):
    for text in ("{}", "[]", "no json", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(DataError, match=r"model\.safetensors\.index\.json"):
            read(tmp_path)


def config(**more):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=50, **sizes | more)


@pytest.fixture
def llama(tmp_path):
    model = LlamaForCausalLM(config())
    torch.save({f"llm.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "llm.pth")
    return model.eval(), tmp_path / "llm.pth"


def built(path, chosen=None, loading=OFFLINE, **more):
    weights = checkpoints.rename_weights(read(path), lambda name: name.removeprefix("llm."))
    return checkpoints.build_model(LlamaForCausalLM, chosen or config(), weights | more, loading, "the model")


def test_build_gives_the_model_of_the_weights(llama):
    model, path = llama
    loaded, report = built(path)
    assert not loaded.training
    assert (report.loaded, report.unexpected, report.files) == (len(model.state_dict()), (), (path,))
    ids = torch.tensor([[1, 7, 49]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_build_reports_what_belongs_nowhere(llama):
    extra = checkpoints.Weight(torch.ones(1), llama[1], "llm.more")
    assert built(llama[1], more=extra)[1].unexpected == ("more",)


def test_shapes_that_differ(llama):
    with pytest.raises(DataError) as caught:
        built(llama[1], config(hidden_size=32))
    text = str(caught.value)
    for word in (str(llama[1]), "llm.model.embed_tokens.weight", "(50, 16)", "(50, 32)"):
        assert word in text


def test_weights_that_are_missing(llama):
    with pytest.raises(DataError, match=r"the model lacks 9 of 30 weights, the first is model\.layers\.2\."):
        built(llama[1], config(num_hidden_layers=3))


def test_weights_of_another_model(tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.pth")
    with pytest.raises(DataError, match=r"lacks 21 of 21 .*x\.pth holds a\.one, which belongs nowhere"):
        built(tmp_path / "x.pth")


def test_auto_is_the_precision_of_most_weights(llama):
    model, path = llama
    held = {name: t.bfloat16() if "mlp" in name or "embed" in name else t for name, t in model.state_dict().items()}
    held |= {name: t.bfloat16() for name, t in held.items() if "self_attn" in name}
    torch.save(held, path)
    assert built(path)[0].dtype == torch.bfloat16
    assert built(path, loading=Loading(dtype="float32"))[0].dtype == torch.float32


def test_digest_is_of_the_content(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    digest, same, other = (digest_files([tmp_path / name]) for name in "abc")
    assert digest == same != other


def test_digest_of_a_file_in_the_hubs_cache_is_that_of_its_content(tmp_path):
    (tmp_path / "plain").write_text("one")
    blob = tmp_path / "blobs" / hashlib.sha256(b"one").hexdigest()
    blob.parent.mkdir()
    blob.write_text("not read")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert digest_files([tmp_path / "model.safetensors"]) == digest_files([tmp_path / "plain"])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_reading_takes_no_memory(tmp_path):
    """100 MB of weights are mapped, not read."""
    big = {"model": {"w": torch.zeros(25, 1000, 1000)}}
    torch.save(big, tmp_path / "big.pth")
    save_file(big["model"], tmp_path / "big.safetensors")
    del big
    before = resident()
    held = [read(tmp_path / name) for name in ("big.pth", "big.safetensors")]
    assert resident() - before < 30e6
    assert [float(weights["w"].tensor[-1, -1, -1]) for weights in held] == [0.0, 0.0]


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
