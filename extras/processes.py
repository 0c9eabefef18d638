"""Several processes train one model: each takes a part of every batch, and sums and gradients are added up."""

from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import nn

# processes wait for the first one while it checks all videos, for longer than torch's default of 10 or 30 minutes
PATIENCE = timedelta(days=7)
BUCKET = 2**20  # elements: small gradients share one all-reduce up to this size


def summed(accelerator: Any, *values: float) -> list[float]:
    """The sum of each value over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(total, group=cpu_group())
    return total.tolist()


@cache
def cpu_group() -> Any:
    """A process group on the CPU. An all-reduce on the GPU would wait for all work that is queued there."""
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def gathered(accelerator: Any, rows: list[Any]) -> list[Any]:
    """The rows of all processes."""
    if accelerator.num_processes == 1:
        return rows
    from accelerate.utils import gather_object

    return gather_object(rows)


class GradientSum:
    """Adds up the gradients of all processes, each as soon as the backward pass has finished it.

    As in DDP (arXiv:2006.15704), gradients travel in buckets while the backward pass goes on with earlier layers.
    Unlike in DDP, a process whose part of the batch is empty adds zeros, and large tensors are summed in place. Each
    loss is divided by the number of targets in all processes, so the sum is the gradient of the whole batch. It is the
    same in every process bit for bit.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        """`parameters` are those that are trained, roughly in the order of use; another order is only slower."""
        # small tensors share a bucket; the last tensors of the model come first, because their gradients do
        self.buckets: list[list[nn.Parameter]] = [[]]
        for parameter in reversed(parameters):
            if sum(p.numel() for p in self.buckets[-1]) + parameter.numel() > BUCKET and self.buckets[-1]:
                self.buckets.append([])
            self.buckets[-1].append(parameter)
        self.bucket_of = {parameter: bucket for bucket, ps in enumerate(self.buckets) for parameter in ps}
        self.reset()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self.on_gradient)

    def reset(self) -> None:
        """Prepares for the next step: nothing is complete, and nothing is sent."""
        self.last_batch = False  # of the optimizer step: only its backward pass completes gradients
        self.missing = [len(bucket) for bucket in self.buckets]  # gradients that are not complete
        self.sent: list[tuple[Any, torch.Tensor]] = []  # (handle, sum) of each bucket that was sent

    def on_gradient(self, parameter: nn.Parameter) -> None:
        """Sends every complete bucket, in the order of the buckets: the all-reduce calls of all processes must
        match."""
        if self.last_batch:
            self.missing[self.bucket_of[parameter]] -= 1
            while len(self.sent) < len(self.buckets) and self.missing[len(self.sent)] == 0:
                self.send_next()

    def send_next(self) -> None:
        """Starts the sum of the next bucket. Tensors that this process did not use add zeros."""
        bucket = self.buckets[len(self.sent)]
        for parameter in bucket:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        flat = bucket[0].grad if len(bucket) == 1 else torch.cat([p.grad.flatten() for p in bucket])
        self.sent.append((torch.distributed.all_reduce(flat, async_op=True), flat))

    def finish(self) -> None:
        """Sends the remaining buckets and waits for all sums, which are then the gradients."""
        while len(self.sent) < len(self.buckets):
            self.send_next()
        for bucket, (handle, flat) in zip(self.buckets, self.sent, strict=True):
            handle.wait()
            if len(bucket) > 1:
                for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                    parameter.grad = part.view_as(parameter)
        self.reset()
