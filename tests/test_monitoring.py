"""The step monitor: averages, the first bad step, and the factor that masks it."""

import math

import pytest
import torch

from crosskd_hf.training.monitoring import NonFiniteLossError, StepClock, StepMonitor, memory_gb

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


def one_rank(row: torch.Tensor) -> torch.Tensor:
    return row


def terms(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_averages_since_the_last_call():
    monitor = StepMonitor(CPU)
    for step, value in enumerate((1.0, 2.0, 6.0), start=1):
        assert monitor.record(terms(loss_cls=value, loss_box=10 * value), step) == 1
    monitor.clock.seconds["step_time"] = 1.5
    logs = monitor.averages(one_rank)
    assert {"loss_cls": 3.0, "loss_box": 30.0, "step_time": 0.5, "data_time": 0.0}.items() <= logs.items()
    assert set(logs) == {"loss_cls", "loss_box", "step_time", "data_time", "memory_gb"}
    assert monitor.averages(one_rank) == {}
    monitor.record(terms(loss_cls=7.0, loss_box=70.0), 4)
    logs = monitor.averages(one_rank)
    assert (logs["loss_cls"], logs["loss_box"], logs["step_time"]) == (7.0, 70.0, 0.0)


def test_averages_before_any_step():
    assert StepMonitor(CPU).averages(one_rank) == {}


def test_averages_are_the_mean_over_ranks():
    monitor = StepMonitor(CPU)
    monitor.record(terms(loss_cls=1.0), 1)
    logs = monitor.averages(lambda row: torch.cat([row, row + torch.tensor([[2.0, 0.0, 0.0, 0.0]])]))
    assert logs["loss_cls"] == 2.0


def test_terms_keep_no_graph_and_any_dtype():
    monitor = StepMonitor(CPU)
    loss = torch.tensor(2.0, requires_grad=True)
    factor = monitor.record({"loss_cls": loss * 3, "loss_box": torch.tensor(1.0, dtype=torch.bfloat16)}, 1)
    assert not monitor.sums.requires_grad and not factor.requires_grad
    assert monitor.sums.dtype == torch.float32
    assert monitor.averages(one_rank)["loss_cls"] == 6.0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_factor_is_nan_only_in_a_bad_step(bad):
    monitor = StepMonitor(CPU)
    factors = [monitor.record(terms(loss_cls=value, loss_box=1.0), step) for step, value in enumerate([1.0, bad, 1.0])]
    assert [math.isnan(factor) for factor in factors] == [False, True, False]
    assert factors[0] == factors[2] == 1


def test_factor_makes_every_gradient_nan_even_if_the_loss_gives_finite_ones():
    monitor = StepMonitor(CPU)
    weight = torch.ones(3, requires_grad=True)
    losses = {"loss_cls": weight.sum() + INF, "loss_box": weight.prod()}
    factor = monitor.record(losses, 1)
    (torch.stack(list(losses.values())).sum() * factor).backward()
    assert weight.grad.isnan().all()


def test_first_bad_term_and_step_are_named():
    monitor = StepMonitor(CPU)
    monitor.record(terms(loss_cls=1.0, loss_box=1.0, kd_cls=1.0), 11)
    monitor.record(terms(loss_cls=1.0, loss_box=NAN, kd_cls=INF), 12)
    monitor.record(terms(loss_cls=NAN, loss_box=NAN, kd_cls=1.0), 13)
    with pytest.raises(NonFiniteLossError, match=r"^loss_box, kd_cls was not finite at step 12$"):
        monitor.averages(one_rank)


def test_bad_step_on_another_rank_is_found():
    monitor = StepMonitor(CPU)
    monitor.record(terms(loss_cls=1.0, loss_box=1.0), 5)
    # Each rank sends three means (two terms, the gradient) and three steps.
    other = torch.tensor([[1.0, NAN, 0.0, -1.0, 4.0, 5.0]])
    with pytest.raises(NonFiniteLossError, match=r"^loss_box was not finite at step 4$"):
        monitor.averages(lambda row: torch.cat([row, other]))


def test_bad_gradient_of_finite_losses_is_named():
    monitor = StepMonitor(CPU)
    for step in (1, 2, 3, 4):
        monitor.record(terms(loss_cls=1.0), step)
        monitor.record_gradient(torch.tensor(step in (2, 3)), step)
    with pytest.raises(NonFiniteLossError, match=r"^gradient was not finite at step 2$"):
        monitor.averages(one_rank)


def test_bad_loss_goes_before_the_gradient_that_comes_of_it():
    monitor = StepMonitor(CPU)
    monitor.record(terms(loss_cls=NAN, loss_box=1.0), 7)
    monitor.record_gradient(torch.tensor(True), 7)
    with pytest.raises(NonFiniteLossError, match=r"loss_cls.* step 7"):
        monitor.averages(one_rank)


def test_good_gradients_leave_no_trace():
    monitor = StepMonitor(CPU)
    monitor.record(terms(loss_cls=1.0), 1)
    monitor.record_gradient(torch.tensor(False), 1)
    assert "gradient" not in monitor.averages(one_rank)


def test_other_terms_start_anew():
    monitor = StepMonitor(CPU)
    monitor.record(terms(loss_cls=100.0), 1)
    monitor.record(terms(loss_cls=1.0, kd_cls=3.0), 2)
    logs = monitor.averages(one_rank)
    assert (logs["loss_cls"], logs["kd_cls"]) == (1.0, 3.0)


def test_what_no_log_has_told_goes_on_with_a_resumed_run():
    monitor = StepMonitor(CPU)
    monitor.record(terms(loss_cls=NAN, loss_box=1.0), 3)
    assert monitor.not_finite() == {"loss_cls": 3}
    again = StepMonitor(CPU)
    again.untold = monitor.not_finite()
    again.record(terms(loss_cls=1.0, loss_box=1.0), 6)
    assert again.not_finite() == {"loss_cls": 3}
    with pytest.raises(NonFiniteLossError, match="loss_cls was not finite at step 3"):
        again.averages(one_rank)
    assert StepMonitor(CPU).not_finite() == {}


def test_memory_of_this_process():
    assert 0.05 < memory_gb(CPU) < 1000


def skipping(*values: float, may_skip: int) -> StepMonitor:
    """Steps of one batch, each with one term of a value; gradients are finite."""
    monitor = StepMonitor(CPU, may_skip)
    for step, value in enumerate(values, start=1):
        monitor.record(terms(loss_cls=value), step)
        monitor.record_gradient(torch.tensor(False), step)
        monitor.end_step()
    return monitor


def test_skipped_steps_are_counted_and_left_out_of_the_means(caplog):
    monitor = skipping(1.0, NAN, INF, 3.0, may_skip=2)
    assert monitor.skipped_so_far() == 2 and monitor.skipped == 0
    logs = monitor.averages(one_rank)
    assert logs["loss_cls"] == 2.0 and logs["skipped_steps"] == 2
    assert "loss_cls was not finite at step 2; 2 steps were skipped since the last log, 2 of at most 2" in caplog.text
    monitor.record(terms(loss_cls=5.0), 5)
    monitor.end_step()
    logs = monitor.averages(one_rank)
    assert (logs["loss_cls"], logs["skipped_steps"]) == (5.0, 2)


def test_more_steps_than_may_be_skipped_stop_the_run():
    assert "loss_cls" not in skipping(NAN, may_skip=1).averages(one_rank)
    with pytest.raises(NonFiniteLossError, match=r"loss_cls was not finite at step 1: 2 steps in all.* allows 1"):
        skipping(NAN, 1.0, NAN, may_skip=1).averages(one_rank)
    with pytest.raises(NonFiniteLossError, match=r"loss_cls was not finite at step 2$"):
        skipping(1.0, NAN, may_skip=0).averages(one_rank)


@pytest.mark.parametrize("may_skip", [0, 1])
def test_what_stopped_a_run_is_neither_counted_nor_told_again(may_skip):
    """By the checkpoint that is saved then, and the run that goes on from it."""
    monitor = skipping(NAN, NAN, may_skip=may_skip)
    with pytest.raises(NonFiniteLossError):
        monitor.averages(one_rank)
    assert monitor.not_finite() == {}
    assert monitor.skipped_so_far() == (2 if may_skip else 0)


def test_a_step_is_skipped_once_whatever_was_bad_in_it():
    monitor = StepMonitor(CPU, 9)
    for value in (NAN, 1.0, NAN):  # accumulated batches
        monitor.record(terms(loss_cls=value), 1)
    monitor.record_gradient(torch.tensor(True), 1)
    monitor.end_step()
    monitor.record(terms(loss_cls=4.0), 2)
    monitor.record_gradient(torch.tensor(True), 2)  # of a finite loss
    monitor.end_step()
    logs = monitor.averages(one_rank)
    assert (logs["loss_cls"], logs["skipped_steps"]) == (2.5, 2)


def test_skipped_steps_over_ranks_weigh_by_what_each_saw():
    monitor = skipping(1.0, NAN, may_skip=3)
    # Another rank: mean 4 of two good batches.
    other = torch.tensor([[4.0, 0.0, -1.0, -1.0, 1.0, 2.0]])
    logs = monitor.averages(lambda row: torch.cat([row, other]))
    assert logs["loss_cls"] == 3.0 and logs["skipped_steps"] == 1


def test_times_are_a_steps_however_many_batches_it_has():
    monitor = StepMonitor(CPU)
    for step in (1, 1, 1, 2, 2, 2):
        monitor.record(terms(loss_cls=1.0), step)
    monitor.clock.seconds["data_time"] = 3.0
    assert monitor.averages(one_rank)["data_time"] == 1.5


def test_overflows_are_counted_in_a_row():
    monitor = StepMonitor(CPU)
    counts = []
    for bad in (True, True, False, True):
        monitor.record_overflow(torch.tensor(bad))
        counts.append(monitor.overflows_in_a_row())
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

    def query(self):
        return self.time <= self.gpu.has_reached

    def synchronize(self):
        self.gpu.waited += not self.query()
        self.gpu.has_reached = max(self.gpu.has_reached, self.time)

    def elapsed_time(self, end):
        assert end.query()
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


def test_events_that_are_over_are_not_kept(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    clock = StepClock(torch.device("cuda"))
    for _ in range(100):
        clock.switch("step_time")
        gpu.reaches += 1.0
        gpu.has_reached = gpu.reaches
    assert len(clock._unread) == 0 and clock.seconds["step_time"] == pytest.approx(0.099)
