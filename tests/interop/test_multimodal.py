"""Folders of Gemma 3 that see images too, beside transformers: the text model in them is what is imported."""

import json

import numpy as np
import pytest

from gptjax.checkpoint import arrays
from gptjax.interop import checkpoint, hf
from gptjax.interop.families import FAMILIES, MULTIMODAL
from gptjax.interop.safetensors import read_header
from gptjax.interop.table import read_config
from gptjax.nn import transformer
from tests.interop import peers

save_file = pytest.importorskip("safetensors.numpy").save_file
torch, transformers = peers.torch, peers.transformers

TEXT = dict(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=7, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=96, head_dim=16, query_pre_attn_scalar=16, sliding_window=7,
    sliding_window_pattern=3,
)  # fmt: skip
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
# As published; the files have 4,300,079,472 parameters.
GEMMA3_4B = """{"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
 "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02,
 "mm_tokens_per_image": 256, "model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
 "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
 "sliding_window": 1024}, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
 "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
 "model_type": "siglip_vision_model", "num_attention_heads": 16,
 "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": false}}"""


def saved(folder, *, tied=True):
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=60, boi_token_index=58,
        eoi_token_index=59, tie_word_embeddings=tied,
    )  # fmt: skip
    model = peers.make(config)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    model.save_pretrained(folder)


def rewritten(folder, rename):
    """The folder with its tensors under other names."""
    tensors = {name: stored.read() for name, stored in read_header(folder / "model.safetensors").items()}
    save_file({rename(name): value for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def since_4_52(name):
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return f"model.{name}".replace("model.language_model.model.", "model.language_model.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma3")
    saved(path)
    return path


@pytest.mark.parametrize(("tied", "rename"), [(True, str), (False, str), (False, since_4_52)])
def test_the_text_model_computes_the_same_and_goes_out_alone(tmp_path, tied, rename):
    saved(tmp_path / "source", tied=tied)
    rewritten(tmp_path / "source", rename)
    source = hf.open_source(tmp_path / "source")
    assert source.model.tie_embeddings == tied and source.family.name == "gemma3_text"
    checkpoint.write(source, tmp_path / "checkpoint")
    tokens = np.random.default_rng(1).integers(0, 57, 24).tolist()
    theirs, ours = peers.TransformersRunner(tmp_path / "source"), peers.GptjaxRunner.load(tmp_path / "checkpoint")
    peers.check_same(theirs, ours, tokens, source.model)
    assert hf.write(tmp_path / "checkpoint", tmp_path / "exported").name == "gemma3_text"
    alone = peers.TransformersRunner(tmp_path / "exported").logits(tokens)
    np.testing.assert_allclose(alone, theirs.logits(tokens), atol=1e-5)


def test_what_is_left_out_is_said(folder, caplog):
    with caplog.at_level("INFO", logger="absl"):
        hf.open_source(folder)
    assert "tensors of multi_modal_projector., vision_tower., which see images" in caplog.text


def test_a_published_config_leaves_out_what_transformers_knows():
    values = json.loads(GEMMA3_4B)
    text = MULTIMODAL["gemma3"].text_config(values, path="config.json")
    model = read_config(FAMILIES["gemma3_text"], text, path="config.json")
    sizes = [leaf.size for leaf in arrays.flatten(transformer.abstract_params(model)).values()]
    config = transformers.Gemma3Config(**values)
    with torch.device("meta"):
        theirs = transformers.Gemma3ForConditionalGeneration(config)
    assert theirs.num_parameters() == 4_300_079_472
    assert theirs.model.language_model.num_parameters() == sum(sizes)
    complete = config.text_config.to_dict()
    assert model == read_config(FAMILIES["gemma3_text"], complete, path="config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "text_config: missing"),
        ({"text_config": [1]}, "text_config: got"),
        ({"text_config": TEXT | {"model_type": "llama"}}, "text_config: model_type: got 'llama'"),
        ({"text_config": TEXT | {"mystery": 1}}, "mystery: 1 is not known"),
        ({"audio_config": {}}, "audio_config: {} is not known"),
        ({"model_type": ["gemma3"]}, r"model_type: got \['gemma3'\]"),
        ({"model_type": "gemma3n"}, "model_type: got 'gemma3n', expected .*gemma3_text.*gemma3"),
    ],
)
def test_a_config_that_is_not_known_is_refused(folder, tmp_path, changes, message):
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        hf.open_source(tmp_path)


def test_a_tensor_under_two_names_and_one_of_no_part_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    norm = "language_model.model.norm.weight"
    tensors = {name: stored.read() for name, stored in read_header(folder / "model.safetensors").items()}
    save_file(tensors | {since_4_52(norm): tensors[norm]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"language_model\.norm\.weight: is there under another name too"):
        hf.open_source(tmp_path)
    save_file(tensors | {"audio_tower.weight": tensors[norm]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"audio_tower\.weight: .* no tensor of a gemma3_text model"):
        checkpoint.write(hf.open_source(tmp_path), tmp_path / "checkpoint")
