"""Act at the steps of a run.

The callbacks evaluate and save when it is time or on a signal, and average the weights.

    trainer = LMTrainer(..., callbacks=[SaveWhenInterrupted(status)])  # it adds the others itself
    with ending.deferred_signals():
        trainer.train()
"""

from __future__ import annotations

from transformers import TrainerCallback

from babyllama import distributed
from babyllama.runs import ending
from babyllama.training.optimizers import WeightAverage
from babyllama.training.steps import Steps


class SaveWhenInterrupted(TrainerCallback):
    """Finish and save the step in which a signal comes, then raise Interrupted; keep the status.

    Several processes agree on the step, whichever of them got the signal.
    """

    def __init__(self, status: ending.Status):
        self.status = status
        self.signal = 0  # the one that this run stops at

    def on_step_end(self, args, state, control, **kwargs):
        self.status.step = state.global_step
        self.signal = distributed.all_reduce_max(ending.received_signal())
        if self.signal:
            control.should_save = True
            control.should_log = True  # a resumed run continues its clock from this row

    def on_save(self, args, state, control, **kwargs):
        self.status.write("running")
        if self.signal:
            distributed.barrier()  # the launcher ends all ranks with the first: wait for the seal
            raise ending.Interrupted(self.signal)


class Intervals(TrainerCallback):
    """Log, evaluate and save at the intervals of the configuration.

    Trainer restores the intervals from the checkpoint, so a resumed run would ignore a change of
    the configuration. We also log whenever we save or evaluate: a run that resumes from a
    checkpoint reads from that row how long training had taken until then.
    """

    def __init__(self, steps: Steps):
        self.epoch_ends = set(steps.epoch_ends.tolist())

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        # Trainer would evaluate an epoch after it has saved the last step, and a run that was
        # killed in between would lack that evaluation
        if args.eval_strategy == "epoch":
            is_last = state.global_step >= state.max_steps
            control.should_evaluate |= is_last or state.global_step in self.epoch_ends
        control.should_log |= control.should_save or control.should_evaluate

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate = False
        control.should_log |= control.should_save


class UpdateAverage(TrainerCallback):
    """Update the moving average of the weights after each step."""

    def __init__(self, average: WeightAverage):
        self.average = average

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update(model)
