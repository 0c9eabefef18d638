"""The shipped tiny backbones are what their cards say, and worth something."""

import numpy as np
import pytest
import torch

import dummy_data
import pretrain_backbones as world
from config import BACKBONES, ROOT


def card(name: str) -> str:
    return (ROOT / "backbones" / f"{name}-tiny" / "CARD.md").read_text(encoding="utf-8")


def load_vision(name: str):
    from transformers import AutoModelForVideoClassification

    return AutoModelForVideoClassification.from_pretrained(ROOT / BACKBONES[name].tiny)


def test_all_four_together_are_small():
    size = sum(f.stat().st_size for f in (ROOT / "backbones").rglob("*") if f.is_file())
    assert size <= 20e6, f"{size / 1e6:.1f} MB"


@pytest.mark.parametrize("name", ["timesformer", "videomae"])
def test_a_linear_head_on_frozen_features(name):
    """>= 90 % of the test set, also of the pairs never seen; random weights 25 points less; one frame near chance."""
    torch.manual_seed(0)
    ours = world.probe(load_vision(name))
    fresh = {"timesformer": world.new_timesformer, "videomae": world.new_videomae}[name]()
    assert ours["all"] >= 0.90 and ours["withheld"] >= 0.80
    assert world.probe(fresh)["all"] <= ours["all"] - 0.25
    assert world.probe(load_vision(name), still=True)["all"] < 0.30  # 1 in 5 knowing the shape
    assert f"| pretrained | {100 * ours['all']:.1f} % |" in card(name)


def test_gpt2_knows_the_grammar():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / BACKBONES["gpt2"].tiny
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    perplexity, best = world.held_out_perplexity(model, tokenizer, count=500)
    assert best <= perplexity <= 1.15 * best


def test_the_grammars_entropy_is_right():
    """No two derivations give the same caption, so -log p is the sum of the logs of the choices."""
    truth = {"size": "small", "colour": "red", "shape": "diamond", "motion": "up left"}
    rng = np.random.default_rng(0)
    captions = {world.draw_caption(truth, rng) for _ in range(20_000)}
    words = 3 * len(world.SHAPE_WORDS["diamond"]) * len(world.MOTION_PHRASES["up left"])
    assert len(captions) == len(dummy_data.TEMPLATES) * words
    choices = len(world.PAIRS) * len(world.COLOURS) * 2 * len(captions)
    assert world.caption_surprise(truth) == pytest.approx(np.log(choices))


def test_bert_tells_hints_apart_and_reads_any_text():
    """Hints and captions lie apart in its features: a nearest-mean rule tells them all."""
    from transformers import AutoModel, AutoTokenizer

    folder = ROOT / BACKBONES["bert"].tiny
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    assert tokenizer.unk_token_id not in tokenizer("any plain text, really?", add_special_tokens=False)["input_ids"]
    notes = [note for notes in dummy_data.HINTS.values() for note in notes.values()]
    rng = np.random.default_rng(0)
    captions = [world.draw_caption(world.draw_truth(rng), rng) for _ in range(len(notes))]

    @torch.no_grad()
    def features(texts):
        rows = [
            [tokenizer.cls_token_id, *tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
            for t in texts
        ]
        return torch.stack([model(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows])

    a, b = features(notes), features(captions)
    middle, axis = (a.mean(0) + b.mean(0)) / 2, a.mean(0) - b.mean(0)
    assert ((a - middle) @ axis > 0).all() and ((b - middle) @ axis < 0).all()


def test_withheld_pairs_and_seeds_never_occur_in_pretraining():
    rng = np.random.default_rng(1)
    shapes, motions = list(world.SHAPES), list(world.MOTIONS)
    drawn = world.draw_objects(rng, 400)
    pairs = {(shapes[s], motions[m]) for s, m in zip(drawn["shape"], drawn["motion"], strict=True)}
    assert not pairs & set(world.WITHHELD) and len(pairs) == len(world.PAIRS)
    assert all((t["shape"], t["motion"]) not in world.WITHHELD for t in (world.draw_truth(rng) for _ in range(500)))


def test_pretraining_resumes_where_it_stopped(tmp_path):
    def losses(steps: list[int], state) -> list[float]:
        torch.manual_seed(0)
        tokenizer = world.kept_tokenizer("bert", state)
        model = world.new_bert(tokenizer)
        seen = []

        def loss_of(rng):
            if len(seen) == steps[0]:
                raise KeyboardInterrupt
            loss = world.masked_token_loss(model, tokenizer, rng)
            seen.append(loss.item())
            return loss

        try:
            world.train("t", torch.nn.ModuleList([model]), loss_of, 6, 1e-3, state, save_every=3)
        except KeyboardInterrupt:
            steps.pop(0)
            seen += losses(steps, state)
        return seen

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    world.kept_tokenizer("bert", tmp_path / "a").save_pretrained(tmp_path / "b" / "bert-tokenizer")
    whole = losses([99], tmp_path / "a")
    broken = losses([4, 99], tmp_path / "b")  # stopped in step 5, goes on from the state of step 3
    assert len(whole) == 6 and broken == [*whole[:4], *whole[3:]]
