"""The batcher under stress: every submit ends exactly once, and nothing runs that nobody wants."""
import asyncio
import contextlib
import gc
import random
import threading
import time
import weakref
from collections import Counter

import pytest
from grocery_nb.serving.batching import Batcher, BatchError, DeadlinePassed, Draining, QueueFull, Waiting, run_batch


class Broken(Exception): pass


class Model:
    "Doubles numbers; notes what it was given and when, how many calls ran at once, and fails as told"

    def __init__(self, seconds=0.001, faults=()):
        self.seconds, self.faults, self.started, self.sizes = seconds, faults, {}, []
        self.running = self.most = 0
        self.lock, self.random = threading.Lock(), random.Random(1)

    def __call__(self, items):
        now = time.monotonic()
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.sizes.append(len(items))
            for item in items:
                assert item not in self.started, "given twice"
                self.started[item] = now
            fault = self.random.choice(self.faults) if self.faults and self.random.random() < 0.1 else None
            seconds = self.seconds * self.random.uniform(0.2, 2)
        time.sleep(seconds)
        with self.lock: self.running -= 1
        if fault == "short": return [2*item for item in items[1:]]
        if fault is not None: raise fault
        return [2*item for item in items]


def hold():
    "A model that starts when told to: (model, started, go)"
    started, go = threading.Event(), threading.Event()
    def run(items):
        started.set()
        assert go.wait(10)
        return items
    return run, started, go


async def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came about"
        await asyncio.sleep(0.001)


LOOPS = ["asyncio"]
with contextlib.suppress(ImportError):
    import uvloop
    LOOPS.append("uvloop")  # what uvicorn[standard] runs on


@pytest.fixture(params=LOOPS)
def run(request):
    "Run a coroutine in a fresh event loop that must have nothing to complain of afterwards"
    def in_a_loop(main, complaints=0):
        found = []
        async def watched():
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: found.append(context))
            try: return await asyncio.wait_for(main, 60)
            finally:
                gc.collect()  # "exception was never retrieved" is said when a future is collected
                await asyncio.sleep(0)
        loop = uvloop.new_event_loop() if request.param == "uvloop" else asyncio.new_event_loop()
        try: result = loop.run_until_complete(watched())
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
        assert len(found) == complaints, found
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch-worker")]
        return result
    return in_a_loop


@pytest.mark.parametrize("workers, max_batch, max_wait, queue_limit", [(1, 8, 0, 12), (3, 4, 0.002, 24), (2, 1, 0, 3), (2, 16, 0.01, 8)])
def test_every_submit_ends_exactly_once(run, workers, max_batch, max_wait, queue_limit):
    "Thousands of items with random cancellations, deadlines and errors: the promises hold for each of them"
    model = Model(faults=[Broken("no"), StopIteration(), asyncio.CancelledError(), SystemExit(3), "short"])
    rng, ends, deadlines, cancelled, depths, observed = random.Random(queue_limit), {}, {}, {}, [], []

    async def request(batcher, item):
        deadlines[item] = time.monotonic() + rng.choice([0.001, 0.005, 0.02]) if rng.random() < 0.3 else None
        try: end = await batcher.submit(item, deadlines[item])
        except BaseException as e: end = e
        assert item not in ends
        ends[item] = end
        depths.append(batcher.depth)

    async def main():
        async with Batcher(model, max_batch, max_wait, queue_limit, workers, lambda *figures: observed.append(figures)) as batcher:
            tasks = {}
            for item in range(2000):
                tasks[item] = asyncio.create_task(request(batcher, item))
                if rng.random() < 0.15:
                    victim = rng.randrange(max(0, item - 30), item + 1)
                    if tasks[victim].cancel(): cancelled.setdefault(victim, time.monotonic())
                if rng.random() < 0.25: await asyncio.sleep(rng.choice([0, 0, 0.0005, 0.003]))
            await asyncio.wait(tasks.values())
            assert batcher.depth == 0 and not batcher.accepted and batcher.threads.idle == workers

    run(main())
    # a task that was cancelled before its first step never came to `submit`
    assert set(range(2000)) - set(ends) <= set(cancelled)
    kinds = Counter(type(end).__name__ for end in ends.values())
    for item, end in ends.items():
        started = model.started.get(item)
        if isinstance(end, int): assert end == 2*item and started is not None
        if isinstance(end, QueueFull): assert started is None and end.retry_after > 0
        if isinstance(end, asyncio.CancelledError): assert item in cancelled
        # the clock is read a moment before `run` is called, and a busy machine may stop between the two
        if started and deadlines[item]: assert started < deadlines[item] + 0.05
        if started and item in cancelled: assert started < cancelled[item] + 0.05
    assert {"int", "QueueFull", "DeadlinePassed", "CancelledError", "Broken", "BatchError"} <= set(kinds), kinds
    assert max(model.sizes) <= max_batch and model.most <= workers and max(depths) <= queue_limit
    assert sum(size for size, _, _ in observed) == len(model.started) and all(wait >= 0 and seconds > 0 for _, wait, seconds in observed)


def test_nothing_starts_after_its_deadline_or_cancellation(run):
    "Exactly: the worker is held, so there is no doubt what came first"
    async def main():
        model, started, go = hold()
        seen = []
        async with Batcher(lambda items: seen.append(items) or model(items), max_batch=8) as batcher:
            first = asyncio.create_task(batcher.submit("first"))
            await until(started.is_set)
            late = asyncio.create_task(batcher.submit("late", time.monotonic() + 0.02))
            gone, kept = asyncio.create_task(batcher.submit("gone")), asyncio.create_task(batcher.submit("kept"))
            await asyncio.sleep(0)
            assert batcher.depth == 3
            gone.cancel()
            with pytest.raises(DeadlinePassed): await late  # while the worker is still held
            assert batcher.depth == 1
            go.set()
            assert await first == "first" and await kept == "kept"
            with pytest.raises(asyncio.CancelledError): await gone
        assert seen == [["first"], ["kept"]]
    run(main())


def test_a_blocked_loop_runs_nothing_late(run):
    "Its timers could not ring: what is too late is left out when a batch is made, and its place in the batch goes to another"
    async def main():
        model, started, go = hold()
        seen = []
        async with Batcher(lambda items: seen.append(items) or model(items), max_batch=2) as batcher:
            soon = time.monotonic() + 0.1
            tasks = [asyncio.create_task(batcher.submit(item, soon if "late" in item else None)) for item in ("first", "late 1", "a", "late 2", "b")]
            await until(started.is_set)
            go.set()
            time.sleep(0.15)
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert seen == [["first"], ["a", "b"]]
        assert [type(end) for end in ends] == [str, DeadlinePassed, str, DeadlinePassed, str]
    run(main())


def test_late_on_the_way_to_the_worker():
    "The deadline passes between `take_batch` and the thread's own look at it"
    async def main():
        loop = asyncio.get_running_loop()
        batch = [Waiting(item, loop.create_future(), time.monotonic(), time.monotonic() + wait) for item, wait in (("late", 0), ("kept", 9))]
        outcome = run_batch(list, batch)
        assert outcome.results == ["kept"] and outcome.ran == batch[1:] and outcome.batch == batch
        assert run_batch(lambda items: 1/0, batch[:1]).error is None, "nobody left: the model is not called"
    asyncio.run(main())


def test_cancelled_in_the_instant_after(run):
    "The result, or the error, is in the future, and the task has not woken up: it ends once, and nothing is logged"
    async def main():
        def picky(items):
            if "bad" in items: raise Broken
            return items
        async with Batcher(picky, max_batch=1) as batcher:
            for item in ("good", "bad"):
                task = asyncio.create_task(batcher.submit(item))
                await asyncio.sleep(0)
                waiting, = batcher.accepted
                while not waiting.future.done(): await asyncio.sleep(0)
                task.cancel()
                with pytest.raises((asyncio.CancelledError, Broken)): await task
                del waiting, task
            assert not batcher.accepted and await batcher.submit("after") == "after"
    run(main())


def test_cancelled_while_it_runs(run):
    async def main():
        model, started, go = hold()
        async with Batcher(model) as batcher:
            task = asyncio.create_task(batcher.submit(1))
            await until(started.is_set)
            task.cancel()
            with pytest.raises(asyncio.CancelledError): await task
            assert batcher.threads.idle == 0, "the worker is not free before run returns"
            go.set()
            assert await batcher.submit(2) == 2
    run(main())


def test_a_coroutine_that_is_thrown_away(run):
    "close() on it, as a dying loop does: no result is sent to it, and its place is free"
    async def main():
        model, started, go = hold()
        async with Batcher(model, queue_limit=1) as batcher:
            first = asyncio.create_task(batcher.submit("first"))
            await until(started.is_set)
            thrown = batcher.submit("thrown")
            thrown.send(None)
            with pytest.raises(QueueFull): await batcher.submit("no place")
            thrown.close()
            last = asyncio.create_task(batcher.submit("last"))
            go.set()
            assert await first == "first" and await last == "last"
    run(main())


def test_full_and_when_to_come_back(run):
    async def main():
        async with Batcher(Model(seconds=0.01), max_batch=4, queue_limit=8) as batcher:
            with contextlib.suppress(QueueFull): await asyncio.gather(*map(batcher.submit, range(9)))
            tasks = [asyncio.create_task(batcher.submit(i)) for i in range(100, 130)]
            await asyncio.sleep(0)
            assert batcher.depth <= 8
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [end for end in ends if isinstance(end, QueueFull)]
            assert refused and all(0.001 < end.retry_after < 5 for end in refused)
            assert "items are waiting" in str(refused[0]) and f"{refused[0].retry_after:.2g} seconds" in str(refused[0])
            assert await batcher.submit(500) == 1000
    run(main())


def test_retry_after_before_anything_was_measured(run):
    async def main():
        model, started, go = hold()
        async with Batcher(model, max_batch=1, queue_limit=1) as batcher:
            tasks = [asyncio.create_task(batcher.submit(i)) for i in range(2)]
            await until(started.is_set)
            with pytest.raises(QueueFull) as refusal: await batcher.submit(3)
            assert refusal.value.retry_after == 1.0
            go.set()
            assert await asyncio.gather(*tasks) == [0, 1]
    run(main())


def test_a_batch_waits_for_company_only_when_it_is_expected(run):
    async def main():
        sizes = []
        async with Batcher(lambda items: sizes.append(len(items)) or items, max_batch=4, max_wait=5) as batcher:
            for i in range(5): await batcher.submit(i)  # alone: never waits
            assert sizes == [1]*5
            batcher.gap.value, batcher.gap.share = 0.0, 0.0
            assert await asyncio.gather(*map(batcher.submit, range(4))) == [0, 1, 2, 3]
            assert sizes == [1]*5 + [4]
            lonely = asyncio.create_task(batcher.submit(9))
            await asyncio.sleep(0.02)
            assert batcher.depth == 1
            assert await batcher.drain(timeout=1) and await lonely == 9  # drains without waiting for company
    start = time.monotonic()
    run(main())
    assert time.monotonic() - start < 4


def test_workers_run_at_once_and_no_more(run):
    async def main():
        model = Model(seconds=0.005)
        async with Batcher(model, max_batch=2, queue_limit=100, workers=3) as batcher:
            assert await asyncio.gather(*map(batcher.submit, range(60))) == [2*i for i in range(60)]
        assert model.most == 3
    run(main())


def test_drain_finishes_what_was_accepted(run):
    async def main():
        batcher = Batcher(Model(), max_batch=4, queue_limit=64).start()
        ends = []
        async def client(number):
            item = number
            while True:
                try: ends.append((item, await batcher.submit(item)))
                except Draining: return
                item += 1000
        clients = [asyncio.create_task(client(number)) for number in range(40)]
        await asyncio.sleep(0.1)
        accepted = len(batcher.accepted)
        before = len(ends)
        assert await batcher.drain(timeout=10)
        await asyncio.gather(*clients)
        assert len(ends) - before >= accepted > 0 and all(end == 2*item for item, end in ends)
        with pytest.raises(Draining): await batcher.submit(-1)
        await batcher.close()
        assert await batcher.drain(1), "nothing left, and no harm done"
    run(main())


def test_drain_and_close_give_up_in_time(run):
    async def main():
        model, started, go = hold()
        batcher = Batcher(model, max_batch=1).start()
        tasks = [asyncio.create_task(batcher.submit(i)) for i in range(3)]
        await until(started.is_set)
        assert not await batcher.drain(timeout=0.02)
        await batcher.close(timeout=0.02)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [Draining]*3 and not batcher.accepted
        go.set()  # the thread comes back late, to futures that have ended
        await until(lambda: not any(thread.is_alive() for thread in batcher.threads.threads))
        await batcher.close()
    run(main())


def test_close_without_start_and_start_twice(run):
    async def main():
        await Batcher(len).close()
        with pytest.raises(BatchError, match="not been started"): await Batcher(len).submit(1)
        async with Batcher(list) as batcher:
            with pytest.raises(BatchError, match="already"): batcher.start()
    run(main())


def test_another_event_loop_is_refused(run):
    async def main():
        async with Batcher(list) as batcher:
            with pytest.raises(BatchError, match="another event loop"): await asyncio.to_thread(lambda: asyncio.run(batcher.submit(1)))
            future = asyncio.to_thread(lambda: asyncio.run_coroutine_threadsafe(batcher.submit(1), batcher.loop).result(5))
            assert await future == 1
    run(main())


def test_a_loop_that_is_gone():
    "Nobody closed the batcher: its thread notices when it comes back, and ends"
    model, started, go = hold()
    async def main():
        batcher = Batcher(model).start()
        task = asyncio.create_task(batcher.submit(1))
        await until(started.is_set)
        task.cancel()
        return batcher.threads.threads[0]
    thread = asyncio.run(main())
    go.set()
    thread.join(5)
    assert not thread.is_alive()


def test_an_error_of_the_observer_harms_nobody(run):
    async def main():
        def broken(*figures): raise Broken
        async with Batcher(list, max_batch=2, observer=broken) as batcher:
            assert await asyncio.gather(*map(batcher.submit, range(5))) == [0, 1, 2, 3, 4]
    run(main(), complaints=3)


def test_an_error_goes_to_its_batch_and_to_nobody_else(run):
    async def main():
        def picky(items):
            if 3 in items: raise Broken("3")
            return items
        async with Batcher(picky, max_batch=2) as batcher:
            ends = await asyncio.gather(*map(batcher.submit, range(6)), return_exceptions=True)
        assert [end if isinstance(end, int) else type(end) for end in ends] == [0, 1, 2, Broken, Broken, 5]
        assert ends[3] is ends[4]
    run(main())


class Picture: pass


@pytest.mark.parametrize("way", ["result", "error", "deadline", "cancelled", "full"])
def test_no_picture_stays_in_memory(run, way):
    "With the garbage collector off: nothing may depend on it when a picture is done with"
    async def main():
        def model(items):
            if way == "error": raise Broken
            return [0 for _ in items]
        gate, started, go = hold()
        async with Batcher(lambda items: gate(items) and model(items), max_batch=1, queue_limit=1) as batcher:
            first = asyncio.create_task(batcher.submit("first"))
            await until(started.is_set)
            second = asyncio.create_task(batcher.submit("second")) if way == "full" else None
            await asyncio.sleep(0)
            picture = Picture()
            alive = weakref.ref(picture)
            deadline = time.monotonic() + 0.02 if way == "deadline" else None
            task = asyncio.create_task(batcher.submit(picture, deadline))
            del picture
            await asyncio.sleep(0.04)
            if way == "cancelled": task.cancel()
            go.set()
            await asyncio.gather(task, first, *([second] if second else []), return_exceptions=True)
            del task, first, second
            await asyncio.sleep(0.02)
            return alive()
    gc.collect()
    gc.disable()
    try: assert run(main()) is None
    finally: gc.enable()
