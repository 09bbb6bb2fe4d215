"""The comparison of variants: its figures by hand, and the page."""

import dataclasses
import json
import math
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore
from gptjax.compress import measure, report
from gptjax.data import loader, source, tokenizer, writer
from gptjax.eval import charts, perplexity
from gptjax.nn import transformer
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat
from tests.tiny import TINY, random_params

SPEC = dataclasses.replace(TINY, vocab_size=260, seq_len=64)
TEXT = "the quick brown fox jumps over the lazy dog and the cat sat on the mat. " * 12
RULE = KernelRule(pattern="group.*kernel", weights=WeightFormat(dtype="int4", group_size=8, symmetric=False))


@pytest.fixture(scope="module")
def original():
    cfg = SPEC.build()
    return cfg, random_params(cfg, scale=0.6)


@pytest.fixture(scope="module")
def variant(original):
    cfg = dataclasses.replace(original[0], quant=QuantConfig(rules=(RULE,)))
    return cfg, transformer.store(cfg, original[1])


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    documents = [source.Document("0", TEXT), source.Document("1", TEXT[5:300])]
    path = tmp_path_factory.mktemp("text") / "store"
    store = writer.write_store(path, documents, tokenizer.byte_level(), description="test")
    return loader.eval_batches(store, batch_size=2, seq_len=64, stride=64)


def refer(original, batches):
    return measure.reference(*original, list(batches), num_bytes=batches.num_bytes)


def test_a_model_beside_itself_is_the_same(original, batches):
    found = measure.quality(refer(original, batches), *original)
    assert (found.kl, found.agreement, found.loss_ratio, found.loss_ratio_error) == (0, 1, 0, 0)
    whole = perplexity.evaluate(*original, batches)
    assert found.loss == pytest.approx(whole.loss, rel=1e-6) and found.accuracy == pytest.approx(whole.accuracy)
    assert found.bits_per_byte == pytest.approx(perplexity.bits_per_byte(whole.nats, batches.num_bytes), rel=1e-6)


def test_figures_of_a_variant_are_those_by_hand(original, variant, batches):
    found = measure.quality(refer(original, batches), *variant)
    losses, kls, same = [], [], []
    for batch in batches:
        args = dict(positions_BT=batch.positions, segment_ids_BT=batch.segment_ids)
        p, q = (
            np.asarray(transformer.logits(*model, transformer.forward(*model, batch.tokens, **args).hidden_BTD), float)
            for model in (original, variant)
        )
        log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        for row in range(2):
            mask = batch.loss_mask[row] > 0
            if mask.any():
                at = np.arange(64), batch.targets[row]
                losses.append((-log_q[row][at][mask].sum(), -log_p[row][at][mask].sum(), mask.sum()))
                kls.append((np.exp(log_p[row]) * (log_p[row] - log_q[row])).sum(-1)[mask].sum())
                same.append((p[row].argmax(-1) == q[row].argmax(-1))[mask].sum())
    own, reference, weight = map(np.asarray, zip(*losses, strict=True))
    assert found.loss == pytest.approx(own.sum() / weight.sum(), rel=1e-5)
    assert found.kl == pytest.approx(sum(kls) / weight.sum(), rel=1e-2) and found.kl > 1e-3
    assert found.agreement == pytest.approx(sum(same) / weight.sum())
    ratio = (own.sum() - reference.sum()) / weight.sum()
    assert found.loss_ratio == pytest.approx(ratio, abs=1e-5)
    rows = len(weight)
    spread = np.square(own - reference - ratio * weight).sum() * rows / (rows - 1)
    assert found.loss_ratio_error == pytest.approx(math.sqrt(spread) / weight.sum(), rel=1e-2)


def test_another_vocabulary_is_refused(original, batches):
    other = dataclasses.replace(SPEC, vocab_size=300).build()
    with pytest.raises(ValueError, match="vocab_size=300: expected the original's 260"):
        measure.quality(refer(original, batches), other, random_params(other))


def test_sizes_are_those_in_memory(original, variant):
    plain, small = measure.size(*original), measure.size(*variant)
    assert plain.memory_bytes == 4 * plain.num_params and small.num_params == plain.num_params
    assert small.memory_bytes < 0.8 * plain.memory_bytes


def test_a_rate_is_never_made_of_noise_alone():
    assert measure._decode_rate(10, 3.0, 1.0) == 5.0
    assert measure._decode_rate(10, 1.1, 1.0) == measure._decode_rate(10, 1.1, 1.2) == 10.0


def test_no_point_of_the_front_is_behind_another():
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 2.0), (2.5, 2.5), (4.0, 1.0), (1.0, 6.0)]
    assert charts.pareto_front(points) == [(1.0, 5.0), (2.0, 2.0), (3.0, 1.0)]


def saved(folder, cfg, params, kind, lineage=()):
    meta = meta_lib.make(cfg, tokenizer=kind.fingerprint, lineage=lineage)
    with CheckpointStore(folder) as store:
        store.save(0, meta=meta, params=params, assets={tokenizer.FILE_NAME: kind.to_bytes()})


def test_the_command_compares_checkpoints(original, variant, tmp_path):
    byte_level, long = tokenizer.byte_level(), "a name that is longer than others and has a <b> in it"
    other = dataclasses.replace(SPEC, vocab_size=64).build()
    letters = tokenizer.characters("abcdefghijklmnopqrstuvwxyz. ")
    for name in ("whole", "damaged"):
        saved(tmp_path / name, *original, byte_level)
    weights, method = {"dtype": "int4", "group_size": 8}, {"rounding": "gptq", "scaling": "none"}
    done = [
        {"stage": "quantize", "method": method, "rules": [{"weights": weights, "activations": "none"}] * 2},
        {"stage": "distill", "loss": "forward_kl", "num_steps": 76},
    ]
    saved(tmp_path / long, *variant, byte_level, done)
    saved(tmp_path / "letters", other, random_params(other), letters)
    largest = max((tmp_path / "damaged").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    (tmp_path / "text.txt").write_text(TEXT)
    questions = [{"query": f"{n} the", "choices": ["cat", "qqq"], "gold": 0} for n in range(20)]
    (tmp_path / "cats.jsonl").write_text("\n".join(map(json.dumps, questions)))
    ckpts = ",".join(f"{tmp_path}/{name}" for name in ("whole", "damaged", "letters", long))
    command = [sys.executable, "-m", "experiments.compress_report", f"--ckpts={ckpts}", "--num_tokens=512"]
    command += [f"--data={tmp_path}/text.txt", f"--out={tmp_path}/out", f"--tasks={tmp_path}/cats.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    figures = json.loads((tmp_path / "out" / "compress.json").read_text())
    whole, small = figures["variants"]
    assert whole["quality"]["kl"] == 0 and small["quality"]["kl"] > 0
    assert small["speed"]["decode"] > 0
    assert figures["failures"].keys() == {"damaged", "letters"}
    assert "has another tokenizer" in figures["failures"]["letters"]
    assert whole["tasks"]["cats"]["num_questions"] == 20 and whole["tasks"]["cats"]["difference"] == 0
    files = [path for path in (tmp_path / long / "ckpt" / "0" / "params").rglob("*") if path.is_file()]
    assert small["disk_bytes"] == sum(path.stat().st_size for path in files)
    page = (tmp_path / "out" / "compress.html").read_text()
    assert "a &lt;b&gt; in" in page and "<b>" not in page and page.count("<circle") == 4 and "Not measured" in page
    assert f"{small['quality']['perplexity']:,.2f}" in page
    assert "quantize: gptq, int4 in groups of 8 → distill: forward_kl, 76 steps" in page and "gptjax" in page
    assert figures["facts"].keys() > {"text", "measured", "device", "versions"}
    picture = ElementTree.parse(tmp_path / "out" / "compress.svg").getroot()
    assert "a name that is longer than" in "".join(picture.itertext()) and len(picture.findall("{*}circle")) == 2
    for flag, message in (("--seq_len=65", "expected at most 64, the context"), ("--num_tokens=512", "has one row")):
        data = [f"--data={tmp_path}/text.txt"] if "seq_len" in flag else [f"--data={tmp_path}/short.txt"]
        (tmp_path / "short.txt").write_text("too short")
        other = [*command[:3], f"--ckpts={tmp_path}/whole", *data, flag, f"--out={tmp_path}/none"]
        refused = subprocess.run(other, capture_output=True, text=True, check=False)
        assert refused.returncode == 2 and message in refused.stderr and not (tmp_path / "none").exists()
    nowhere = subprocess.run([*command[:-2], "--out=/proc/x/out"], capture_output=True, text=True, check=False)
    assert nowhere.returncode == 2 and "error: /proc/x/out: cannot be made" in nowhere.stderr and not nowhere.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "has a report already, which is not overwritten" in again.stderr


def test_lines_of_the_table_have_a_cell_for_each_head(original, batches):
    quality = measure.quality(refer(original, batches), *original)
    one = report.Variant(
        name="a",
        quality=quality,
        size=measure.size(*original),
        speed=measure.Speed(prefill=1.0, decode=2.0),
        disk_bytes=9,
    )
    (head, row), (other_head, other_row), tasks = report.tables([one])
    assert len(other_head) == len(other_row) and tasks == []
    lines = report.as_text([one]).splitlines()
    assert len(lines[0]) == len(lines[1]) and lines[0].startswith("model") and lines[2] == ""
    assert len(head) == len(row) and other_row[other_head.index("of original")] == "100%"
