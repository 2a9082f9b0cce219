"""Clocks forgive pauses, checkpoints are whole, averages follow, Muon makes matrices orthogonal."""

import pytest
import torch

from training import metrics
from training.optimizer import MuonAdamW, Rates, orthogonalize
from training.progress import Average, TrainingClock, decay, load_checkpoint, save_checkpoint


def test_a_pause_counts_as_one_long_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("training.progress.time.monotonic", lambda: now[0])
    clock = TrainingClock(100.0)
    for passed in (1.0, 3600.0, 1.0):
        now[0] += passed
        clock.tick()
    assert clock.spent_s == pytest.approx(22.0)
    assert not clock.is_over


def test_a_budget_in_steps_ignores_time():
    clock = TrainingClock(4.0, step_s=1.0)
    for _ in range(4):
        assert not clock.is_over
        clock.tick()
    assert clock.is_over


def test_learning_rate_is_constant_then_falls():
    rates = [decay(fraction, 0.5) for fraction in (0.0, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.02])


class Unsaveable:
    def __reduce__(self):
        raise RuntimeError("cannot be saved")


def test_a_checkpoint_that_fails_to_save_leaves_the_one_before(tmp_path):
    path = tmp_path / "run" / "model.pt"
    assert load_checkpoint(path) is None
    save_checkpoint(path, {"step": 1})
    with pytest.raises(RuntimeError, match="cannot be saved"):
        save_checkpoint(path, {"step": Unsaveable()})
    assert load_checkpoint(path) == {"step": 1}


def test_an_average_converges_to_constant_weights():
    layer = torch.nn.Linear(3, 3)
    average = Average(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    for _ in range(100):
        average.update(layer)
    torch.testing.assert_close(average.weights["weight"], layer.weight.detach(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, *shape)))
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_muon_and_adamw_lower_a_loss_and_resume_exactly():
    torch.manual_seed(0)
    goal = torch.randn(6, 6)

    def make():
        torch.manual_seed(1)
        layer = torch.nn.Linear(6, 6)
        rates = Rates(muon=0.02, adamw=0.01)
        return layer, MuonAdamW(layer.named_parameters(), lambda _, p: p.ndim == 2, rates)

    def descend(layer, optimizer, steps):
        for _ in range(steps):
            loss = ((layer.weight - goal) ** 2).mean() + (layer.bias**2).mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    straight, optimizer = make()
    first = descend(straight, optimizer, 1)
    weights = {name: value.clone() for name, value in straight.state_dict().items()}
    again, other = make()
    again.load_state_dict(weights)
    other.load_state_dict(optimizer.state_dict())
    assert descend(straight, optimizer, 60) < 0.5 * first
    descend(again, other, 60)
    torch.testing.assert_close(again.weight, straight.weight, atol=0, rtol=0)


def test_matrices_of_one_shape_are_stepped_as_each_would_be_alone():
    def step(count):
        torch.manual_seed(0)
        layers = torch.nn.ModuleList(torch.nn.Linear(8, 4) for _ in range(3))[:count]
        rates = Rates(muon=0.1, adamw=0.1, weight_decay=0.1)
        optimizer = MuonAdamW(layers.named_parameters(), lambda _, p: p.ndim == 2, rates)
        for _ in range(2):
            for index, layer in enumerate(layers):
                layer.weight.grad = torch.randn(
                    4, 8, generator=torch.Generator().manual_seed(index)
                )
            optimizer.step()
        return layers[0].weight

    torch.testing.assert_close(step(3), step(1), atol=1e-3, rtol=0)


def test_metrics_of_equal_and_of_different_pictures():
    picture = torch.rand(2, 3, 64, 64) * 2 - 1
    assert metrics.psnr(picture, picture) > 90
    assert metrics.ssim(picture, picture) == pytest.approx(1.0)
    assert metrics.psnr(picture, picture + 0.02) == pytest.approx(40.0, abs=0.01)
    assert metrics.ssim(picture, -picture) < 0


def test_pictures_survive_the_way_to_pil_and_back():
    picture = torch.randint(0, 256, (2, 3, 8, 8)) / 127.5 - 1
    back = metrics.to_tensor(metrics.to_images(picture))
    torch.testing.assert_close(back, picture, atol=1e-5, rtol=0)
