import time

from formix.benchmarks import interleaved_medians


def test_the_slower_call_takes_longer_and_calls_alternate_in_both_directions():
    order = []

    def sleeper(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)

        return call

    medians = interleaved_medians({"slow": sleeper("slow", 0.02), "fast": sleeper("fast", 0.002)}, repeats=5)
    assert medians["slow"] > 3 * medians["fast"]
    assert order[4:] == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow", "slow", "fast"]


def test_the_time_limit_leaves_at_least_three_rounds():
    calls = []
    interleaved_medians({"only": lambda: calls.append(time.sleep(0.02))}, repeats=100, seconds=0.01)
    assert len(calls) == 2 + 3
