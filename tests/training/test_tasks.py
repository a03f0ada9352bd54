import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import matthews_corrcoef
from torch import nn

import formix
from formix.data import load_data
from formix.data.masking import masked_lm
from formix.training import evaluate, forward
from formix.training.tasks import loss_of, task_objective


class FixedLogits(nn.Module):
    """Answers with a bigram table, whatever came before; looks like a language model."""

    def __init__(self, size: int = 256) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids):
        return type("Output", (), {"logits": self.table[input_ids]})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 200)
    return load_data(f"text:{path}", sequence_length=16)


def test_bits_per_byte_is_the_mean_over_all_targets(text):
    model = FixedLogits()
    nats, targets = 0.0, 0
    for i in range(len(text.test)):
        sample = text.test[i]
        log_p = model.table.double().log_softmax(-1)[sample["input_ids"]]
        nats -= log_p.gather(-1, sample["labels"][:, None]).sum().item()
        targets += len(sample["labels"])
    expected = nats / targets / math.log(2)
    assert evaluate(model, text, "test") == pytest.approx(expected, rel=1e-5)
    assert evaluate(model, text, "test", batch_size=7) == pytest.approx(expected, rel=1e-5)


def test_accuracy_counts_every_sample_once_and_restores_the_mode(digits, make_model):
    model = make_model().train()
    model.blocks[0].eval()  # frozen
    modes = [module.training for module in model.modules()]
    accuracy = evaluate(model, digits, "test", batch_size=100)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    hits = [
        model(digits.test[i]["pixel_values"][None]).argmax() == digits.test[i]["labels"]
        for i in range(len(digits.test))
    ]
    assert accuracy == pytest.approx(torch.stack(hits).double().mean().item())


def test_images_are_read_in_the_type_of_the_weights(digits, make_model):
    model = make_model()
    wide = evaluate(copy.deepcopy(model).double(), digits, "test")
    assert evaluate(model.bfloat16(), digits, "test") == pytest.approx(wide, abs=0.03)


@pytest.mark.parametrize("constant", [True, False])
def test_correlation_is_that_of_scikit_learn_and_zero_for_one_and_the_same_answer(digits, make_model, constant):
    model, test = make_model(num_classes=2).eval(), copy.copy(digits.test)
    test.labels = (test.labels < 3).long()
    data = dataclasses.replace(digits, test=test, num_classes=2, metric="matthews_corrcoef")
    if constant:
        model.get_classifier().weight.data.zero_()
    predicted = [model(test[i]["pixel_values"][None]).argmax().item() for i in range(len(test))]
    assert (len(set(predicted)) == 1) == constant
    expected = matthews_corrcoef(test.labels, predicted)
    assert evaluate(model, data, "test") == pytest.approx(0 if constant else expected)


@pytest.mark.parametrize("metric", ["accuracy", "matthews_corrcoef", "spearman"])
def test_an_output_that_is_no_number_makes_the_metric_none(digits, metric):
    class OneLost(nn.Module):  # of the last batch, the last
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, pixels):
            logits = pixels.flatten(1)[:, 20:30].clone()
            logits[-1] = math.nan if len(pixels) < 64 else 0.0
            return logits

    task = "sequence-regression" if metric == "spearman" else digits.task
    data = dataclasses.replace(digits, metric=metric, task=task)
    assert len(data.test) % 64
    assert math.isnan(evaluate(OneLost(), data, "test", batch_size=64))


def test_losses_of_the_tasks(digits):
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    assert loss_of(logits, labels, digits, 0.1) == F.cross_entropy(logits, labels, label_smoothing=0.1)
    regression = type("Regression", (), {"task": "sequence-regression"})()
    scores = torch.randn(4)
    assert loss_of(logits[:, :1], scores, regression) == F.mse_loss(logits[:, 0], scores)


def test_sigmoid_loss_is_a_binary_question_per_class_summed(digits):
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    hot = F.one_hot(labels, 10)
    expected = -(hot * logits.sigmoid().log() + (1 - hot) * (1 - logits.sigmoid()).log()).sum(1).mean()
    torch.testing.assert_close(loss_of(logits, labels, digits, loss="sigmoid"), expected)
    torch.testing.assert_close(loss_of(logits, hot.float(), digits, loss="sigmoid"), expected)


REFUSED = {
    "masked-lm": ({"loss": "sigmoid"}, "'sigmoid', which is for classes, and 'a' is masked-lm"),
    "causal-lm": ({"loss": "sigmoid"}, "use 'softmax'"),
    "sequence-regression": ({"loss": "sigmoid"}, "use 'softmax'"),
    "sequence-regression smoothed": ({"label_smoothing": 0.1}, "label_smoothing is 0.1, and the labels of 'a' are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_losses_that_a_task_has_not(case, digits):
    settings, named = REFUSED[case]
    with pytest.raises(ValueError, match=named):
        task_objective(dataclasses.replace(digits, name="a", task=case.split()[0]), **settings)


@pytest.mark.parametrize("task", ["image-classification", "sequence-classification", "causal-lm", "masked-lm"])
def test_labels_are_smoothed_wherever_there_are_classes_or_tokens(task, digits):
    assert task_objective(dataclasses.replace(digits, task=task), label_smoothing=0.1)


def test_labels_that_are_distributions_and_labels_that_do_not_count(digits):
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, -100, 4])
    soft = F.one_hot(labels[[0, 1, 3]], 10).float()
    for smoothing in (0.0, 0.1):
        expected = loss_of(logits[[0, 1, 3]], soft, digits, smoothing)
        torch.testing.assert_close(loss_of(logits, labels, digits, smoothing), expected)


def test_perplexity_is_of_the_masked_tokens_alone(text):
    data, model = masked_lm(text), FixedLogits(258)
    nats, targets = 0.0, 0
    for i in range(len(data.test)):
        sample = data.test[i]
        log_p = model.table.double().log_softmax(-1)[sample["input_ids"]]
        chosen = sample["labels"] >= 0
        nats -= log_p[chosen].gather(-1, sample["labels"][chosen][:, None]).sum().item()
        targets += int(chosen.sum())
    assert evaluate(model, data, "test", batch_size=7) == pytest.approx(math.exp(nats / targets), rel=1e-5)


def test_forward_gives_image_logits(digits, make_model):
    batch = digits.train.__getitems__([0, 1, 2])
    assert forward(make_model(), batch).shape == (3, 10)


def test_a_cvt_gives_logits_as_timm_s_models_do():
    sizes = {"embed_dim": [4, 4, 8], "depth": [1, 1, 1], "num_heads": [1, 1, 2]}
    model = formix.create_model("cvt-13", "relu", in_chans=1, num_classes=10, **sizes)
    images = load_data("digits", limit=20, img_size=32)
    assert forward(model, images.train.__getitems__([0, 1])).shape == (2, 10)
