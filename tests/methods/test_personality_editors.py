"""MEND and IKE with the loss and the demonstrations of PersonalityEdit."""

import math
from dataclasses import replace

import pytest
import torch
from episode_support import EXAMPLES, batch_gradient
from fit_support import fit
from hypernetwork_support import SMALL
from places import SAMPLES
from support import tiny_base

from kedit_lightning import EditBatch, EditRequest
from kedit_lightning.data import PersonalityEdit
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.methods import IKE, MALMEN, MEND
from kedit_lightning.methods.hypernetwork.shared.mend_network import MENDPlan
from kedit_lightning.methods.hypernetwork.shared.outer_loss import outer_losses, unlikelihood
from kedit_lightning.methods.training.episodes import make_episodes, with_unlikelihood

PATH = SAMPLES / "published" / "personalityedit.json"
CONDITION = "Topic: {subject}\nTarget: {task}\n"
TEMPLATE = "Show {task} about {subject}.\n"


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama", max_position_embeddings=256)


@pytest.fixture(scope="module")
def topics():
    return PersonalityEdit(path=PATH, seed=0).examples()


def mend(base, **settings):
    method = MEND(base, **{"checkpoint": "none", **SMALL, **settings})
    method.configure_model()
    return method


def test_unlikelihood_by_hand():
    """Of tokens of 1/2 and 1/8 the mean is 1/4; padding is left out; a sure one is finite."""
    probabilities = torch.tensor([[0.5, 0.125, 1e-9], [1.0, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logs = probabilities.log().requires_grad_()
    found = unlikelihood(logs, mask)
    assert found.tolist() == pytest.approx([-math.log(0.75), -math.log(1e-6)], rel=1e-5)
    found[0].backward()
    # d/dm of -log(1 - exp m) is exp m / (1 - exp m), shared out to two tokens
    assert logs.grad[0].tolist() == pytest.approx([0.25 / 0.75 / 2] * 2 + [0.0])


def test_every_answer_is_learned_and_every_other_trait_avoided(topics):
    (episode,) = make_episodes(topics[:1], rephrases=1)
    assert (len(episode.asked), len(episode.avoided)) == (1, 0)
    found = with_unlikelihood(episode)
    task = topics[0].probes[0].task
    assert [probe.answers for probe in found.asked] == [(a,) for a in topics[0].probes[0].answers]
    assert [probe.answers for probe in found.avoided] == [(a,) for a in task.against]
    assert {probe.prompt for probe in found.asked + found.avoided} == {episode.asked[0].prompt}
    assert found.kept == episode.kept
    assert found.kept[0].answers  # opinions about the other topic
    (plain,) = make_episodes(EXAMPLES[:1])
    assert with_unlikelihood(plain) == plain


def test_the_loss_is_the_sum_of_its_three_parts(base, topics):
    """Two topics together as each alone, and each as its rows give it."""
    episodes = [with_unlikelihood(one) for one in make_episodes(topics[:2])]
    found = outer_losses(base, episodes, {}, {})
    for number, episode in enumerate(episodes):
        alone = outer_losses(base, [episode], {}, {})
        assert torch.allclose(alone.edit, found.edit[number], atol=1e-12)
        logs, tokens = 0.0, 0
        for probe in episode.asked:
            rows = base.rows([probe.prompt], [probe.answers[0]])
            logs -= float(base.answer_log_probs(rows).sum())
            tokens += int(rows.answer_mask.sum())
        avoided = 0.0
        for probe in episode.avoided:
            rows = base.rows([probe.prompt], [probe.answers[0]])
            mean = float(base.answer_log_probs(rows).sum()) / int(rows.answer_mask.sum())
            avoided -= math.log(1 - math.exp(mean)) / len(episode.avoided)
        assert found.edit[number].item() == pytest.approx(logs / tokens + avoided, abs=1e-9)
        assert found.locality[number].item() == pytest.approx(0.0, abs=1e-12)
        plain = outer_losses(base, [replace(episode, avoided=())], {}, {})
        assert plain.edit.item() == pytest.approx(logs / tokens, abs=1e-9)


@pytest.mark.parametrize("method", [MEND, MALMEN])
def test_hypernetworks_learn_it(base, topics, method):
    grads = []
    for unlikely in (False, True):
        made = method(base, checkpoint="none", unlikelihood=unlikely, n_edits=2)
        made.configure_model()
        grads.append(batch_gradient(made, EditBatch(topics[:2])))
    assert float(grads[0].loss) != float(grads[1].loss)
    assert all(g.skipped == 0 for g in grads)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_gradient_of_a_request_is_taken_behind_its_condition(base, topics):
    request = topics[0].requests[0]
    method, plain = mend(base, condition=CONDITION), mend(base)
    stated = "Topic: Harbour Fair\nTarget: extraversion\n" + request.prompt
    edits = [method.edit([request]), plain.edit([replace(request, prompt=stated)])]
    other = plain.edit([request])
    for name, delta in edits[0].deltas().items():
        assert torch.equal(delta, edits[1].deltas()[name])
        assert not torch.equal(delta, other.deltas()[name])
    (episode,) = method.episodes(EditBatch(topics[:1]))
    assert episode.requests[0].prompt == stated
    assert not any("Topic:" in probe.prompt for probe in episode.asked)
    with pytest.raises(InvalidRequestError, match="field 'task' is absent"):
        method.edit([EditRequest("Rome is", "big", "Rome")])


def test_a_checkpoint_holds_the_condition_and_older_ones_have_none(base, tmp_path):
    data = PersonalityEdit(path=PATH, train_path=PATH, seed=0)
    method = MEND(base, **{**SMALL, "condition": CONDITION, "unlikelihood": True})
    trainer = fit(method, tmp_path, source=data)
    path = tmp_path / "mend.ckpt"
    trainer.save_checkpoint(path)
    again = MEND(base, checkpoint=str(path))
    again.configure_model()
    assert again.settings.condition == CONDITION
    values = torch.load(path, weights_only=True)["plan"]
    assert values.pop("condition") == CONDITION
    assert MENDPlan.from_json(values).condition is None


def test_demonstrations_state_the_trait_of_their_own_topic(base, topics):
    pool = PersonalityEdit(path=PATH, train_path=PATH, seed=0, trait="agreeableness")
    method = IKE(base, demonstrations=2, pool=pool, template=TEMPLATE)
    method.configure_model()
    request = topics[0].requests[0]
    edit = method.edit([request])
    with edit:
        text = base.edits.render("Question: Well?\nAnswer:", lambda text: 1)
    assert text.endswith("Show extraversion about Harbour Fair.\nQuestion: Well?\nAnswer:")
    shown = text.split("\n\n")[:-1]
    assert len(shown) == 2
    for part, topic in zip(sorted(shown), ("Bolt Street", "Orrin Mill"), strict=True):
        assert part.startswith(f"Show agreeableness about {topic}.\nQuestion: ")
    # What the edit should lead to stands nowhere before the question.
    assert not any(answer in text for answer in topics[0].probes[0].answers)
    stated = IKE(base, demonstrations=2, pool=pool, template=TEMPLATE + "Say: {target}\n")
    stated.configure_model()
    with stated.edit([request]):
        text = base.edits.render("Well?", lambda text: 1)
    assert text.count(request.target_new) == 3  # demonstrated too, and stated
