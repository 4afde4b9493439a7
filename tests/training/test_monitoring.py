"""The step monitor: averages, what is not finite and since when, and the clocks."""

import pytest
import torch

from crosskd_hf.training.step_monitor import NonFiniteLossError, StepClock, StepMonitor

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


def one_rank(row: torch.Tensor) -> torch.Tensor:
    return row


def averages(monitor: StepMonitor, gather=one_rank, **tensors: torch.Tensor) -> dict[str, float]:
    return monitor.averages(tensors, gather)


def terms(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_averages_since_the_last_call():
    monitor = StepMonitor(CPU)
    for step, value in enumerate((1.0, 2.0, 6.0), start=1):
        monitor.record(terms(loss_cls=value, loss_box=10 * value), step)
    monitor.clock.spans += [("step_time", 10.0, 11.0), ("step_time", 20.0, 20.5)]
    logs = averages(monitor)
    assert {"loss_cls": 3.0, "loss_box": 30.0, "step_time": 0.5, "data_time": 0.0}.items() <= logs.items()
    assert set(logs) == {"loss_cls", "loss_box", "step_time", "data_time", "memory_gb"}
    assert averages(monitor) == averages(StepMonitor(CPU)) == {}
    monitor.record(terms(loss_cls=7.0, loss_box=70.0), 4)
    logs = averages(monitor)
    assert (logs["loss_cls"], logs["loss_box"], logs["step_time"]) == (7.0, 70.0, 0.0)


def test_batches_of_another_kind_are_averaged_apart():
    """Two labelled batches and an unlabelled one in two steps; then the other kind alone."""
    monitor = StepMonitor(CPU)
    for step, values in ((1, {"loss_cls": 1.0}), (1, {"unlabeled_kd_cls": 8.0}), (2, {"loss_cls": 3.0})):
        monitor.record(terms(**values), step)
    assert {"loss_cls": 2.0, "unlabeled_kd_cls": 8.0}.items() <= averages(monitor).items()
    monitor.record(terms(unlabeled_kd_cls=NAN), 3)
    with pytest.raises(NonFiniteLossError, match=r"^unlabeled_kd_cls was not finite at step 3$"):
        averages(monitor)


def test_averages_are_the_mean_over_ranks():
    monitor = StepMonitor(CPU)
    monitor.record(terms(loss_cls=1.0), 1)
    logs = averages(monitor, lambda row: torch.cat([row, row + torch.tensor([[2.0, 0.0, 0.0]])]))
    assert logs["loss_cls"] == 2.0


def test_terms_keep_no_graph_and_any_dtype():
    monitor = StepMonitor(CPU)
    loss = torch.tensor(2.0, requires_grad=True)
    monitor.record({"loss_cls": loss * 3, "loss_box": torch.tensor(1.0, dtype=torch.bfloat16)}, 1)
    (kind,) = monitor.kinds.values()
    assert not kind.sums.requires_grad
    assert kind.sums.dtype == torch.float32
    assert averages(monitor)["loss_cls"] == 6.0


def test_first_bad_term_and_step_are_named():
    monitor = StepMonitor(CPU)
    monitor.record(terms(loss_cls=1.0, loss_box=1.0, kd_cls=1.0), 11)
    monitor.record(terms(loss_cls=1.0, loss_box=NAN, kd_cls=INF), 12)
    monitor.record(terms(loss_cls=NAN, loss_box=NAN, kd_cls=1.0), 13)
    with pytest.raises(NonFiniteLossError, match=r"^loss_box, kd_cls was not finite at step 12$"):
        averages(monitor)


def test_bad_step_on_another_rank_is_found():
    monitor = StepMonitor(CPU)
    monitor.record(terms(loss_cls=1.0, loss_box=1.0), 5)
    # Each rank sends a mean and a step for each of two terms, and the largest value of its tensors.
    other = torch.tensor([[1.0, NAN, -1.0, 4.0, 1.0]])
    with pytest.raises(NonFiniteLossError, match=r"^loss_box was not finite at step 4$"):
        averages(monitor, lambda row: torch.cat([row, other]))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_tensor_that_is_not_finite_is_named(bad):
    good, other = torch.full((3,), 3e38), torch.ones(2, 2)
    other[1, 0] = bad
    StepMonitor(CPU).check({"steps": torch.tensor(1), "good": good}, one_rank)
    with pytest.raises(NonFiniteLossError, match=r"^other is not finite$"):
        StepMonitor(CPU).check({"good": good, "other": other}, one_rank)
    elsewhere = torch.tensor([[bad]])
    with pytest.raises(NonFiniteLossError, match="another process"):
        StepMonitor(CPU).check({"good": good}, lambda row: torch.cat([row, elsewhere]))


def test_a_bad_loss_goes_before_the_weights_that_come_of_it():
    monitor = StepMonitor(CPU)
    for step, value in enumerate((1.0, INF, 1.0), start=6):
        monitor.record(terms(loss_cls=value), step)
    with pytest.raises(NonFiniteLossError, match=r"^loss_cls was not finite at step 7$"):
        monitor.check({"weight": torch.tensor(NAN)}, one_rank)


def test_a_check_leaves_the_sums_for_the_log():
    monitor = StepMonitor(CPU)
    monitor.record(terms(loss_cls=2.0), 1)
    assert monitor.check({}, one_rank) == {"loss_cls": 2.0}
    monitor.record(terms(loss_cls=4.0), 2)
    assert averages(monitor)["loss_cls"] == 3.0


def test_other_terms_start_anew():
    monitor = StepMonitor(CPU)
    monitor.record(terms(loss_cls=100.0), 1)
    monitor.record(terms(loss_cls=1.0, kd_cls=3.0), 2)
    logs = averages(monitor)
    assert (logs["loss_cls"], logs["kd_cls"]) == (1.0, 3.0)


def test_times_are_a_steps_however_many_batches_it_has():
    monitor = StepMonitor(CPU)
    for step in (1, 1, 1, 2, 2, 2):
        monitor.record(terms(loss_cls=1.0), step)
    monitor.clock.spans.append(("data_time", 0.0, 3.0))
    logs = averages(monitor)
    assert logs["data_time"] == 1.5 and 0.05 < logs["memory_gb"] < 1000


def test_overflows_are_counted_in_a_row():
    monitor = StepMonitor(CPU)
    counts = []
    for bad in (True, True, False, True):
        monitor.record_overflow(torch.tensor(bad))
        counts.append(int(monitor.overflows))
    assert counts == [1, 2, 0, 1]


class FakeGpu:
    """A stream that does one thing after another: an event has the time, in ms, at which it comes to it."""

    def __init__(self):
        self.reaches, self.has_reached = 0.0, 0.0  # when it is through with what it has been given; what is past
        self.waited = 0

    def event(self, enable_timing):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.time = self.gpu.reaches

    def synchronize(self):
        self.gpu.waited += 1
        self.gpu.has_reached = max(self.gpu.has_reached, self.time)

    def elapsed_time(self, end):
        assert end.time <= self.gpu.has_reached
        return end.time - self.time


@pytest.mark.parametrize(("loader", "waits"), [(50.0, 0.0), (250.0, 50.0)])
def test_a_gpus_times_are_its_own(monkeypatch, loader, waits):
    """It works 200 ms on a step. What the host waits for data meanwhile is no data time; what the GPU waits is."""
    gpu, host = FakeGpu(), 0.0
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    clock = StepClock(torch.device("cuda"))
    for _ in range(3):
        clock.switch("data_time")
        host += loader
        gpu.reaches = max(gpu.reaches, host)  # it can't begin before it is told
        clock.switch("step_time")
        gpu.reaches += 200.0
        clock.switch(None)
    assert gpu.waited == 0
    seconds = clock.take()
    assert seconds["step_time"] == pytest.approx(0.6)
    assert seconds["data_time"] == pytest.approx((loader + 2 * waits) / 1000)
    assert clock.take() == {"data_time": 0.0, "step_time": 0.0}
