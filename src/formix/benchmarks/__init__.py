"""Speed and FLOPs."""

from formix.benchmarks.flops import count_flops, flops_by_module, mixer_flops
from formix.benchmarks.latency import interleaved_medians

__all__ = ["count_flops", "flops_by_module", "interleaved_medians", "mixer_flops"]
