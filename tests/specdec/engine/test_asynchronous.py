"""Coroutines of one event loop share an engine that a thread steps."""

import asyncio
import threading
import time

import pytest

from tests.specdec.engine.test_engine import engine_of, prompts_of, require_empty, solo


async def collected(stream):
    return [token async for tokens in stream for token in tokens]


def test_many_coroutines_get_the_texts_of_requests_alone():
    engine, prompts = engine_of(max_rows=4), prompts_of(10)
    waiting, threads = engine.submit(prompts[0], max_new_tokens=3), set()
    callback = lambda handle, new_tokens: threads.add(threading.current_thread())

    async def main():
        handles = [engine.generate_async(prompt, max_new_tokens=9, callback=callback) for prompt in prompts[:6]]
        streams = [collected(engine.stream_async(prompt, max_new_tokens=9)) for prompt in prompts[6:]]
        return await asyncio.gather(*handles, *streams)

    for _ in range(2):  # an engine outlives event loops
        results = asyncio.run(main(), debug=True)
        texts = [handle.tokens for handle in results[:6]] + results[6:]
        assert texts == [solo("chain", prompt, {})[:9] for prompt in prompts]
        assert all(handle.reason == "length" for handle in results[:6])
        require_empty(engine)
    assert waiting.finished and threading.main_thread() not in threads


def test_errors_reach_the_coroutine_that_they_belong_to():
    def broken(handle, new_tokens):
        raise LookupError("seen enough")

    engine, prompt = engine_of(), prompts_of(1)[0]

    async def main():
        return await asyncio.gather(
            engine.generate_async(prompt, temprature=1.0),
            engine.generate_async(prompt, callback=broken),
            collected(engine.stream_async(prompt, callback=broken)),
            engine.generate_async(prompt, max_new_tokens=5),
            return_exceptions=True,
        )

    refused, ended, streamed, good = asyncio.run(main())
    assert isinstance(refused, TypeError) and isinstance(streamed, LookupError)
    assert ended.reason == "error" and isinstance(ended.error, LookupError)
    assert good.tokens == solo("chain", prompt, {})[:5]
    require_empty(engine)


def test_what_breaks_a_step_reaches_all():
    engine, prompt = engine_of(), prompts_of(1)[0]

    async def main():
        return await asyncio.gather(*(engine.generate_async(prompt) for _ in range(2)), return_exceptions=True)

    step = engine.step
    engine.step = lambda: 1 / 0
    assert [type(error) for error in asyncio.run(main())] == [ZeroDivisionError] * 2
    engine.step = step
    require_empty(engine)
    assert [handle.reason for handle in asyncio.run(main())] == ["length"] * 2


def test_a_cancelled_coroutine_cancels_its_request():
    engine, prompts, seen = engine_of(max_rows=2), prompts_of(4), []

    async def main():
        options = dict(max_new_tokens=60, callback=lambda handle, new_tokens: seen.append(handle))
        long = asyncio.create_task(engine.generate_async(prompts[0], **options))
        early = asyncio.create_task(engine.generate_async(prompts[1]))
        await asyncio.sleep(0)
        early.cancel()  # not submitted yet
        short = engine.stream_async(prompts[2], max_new_tokens=50)
        first = await anext(short)
        await short.aclose()
        while not seen:
            await asyncio.sleep(0.001)
        long.cancel()
        good = await engine.generate_async(prompts[3], max_new_tokens=8)
        with pytest.raises(asyncio.CancelledError):
            await long
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.generate_async(prompts[0], max_new_tokens=140, eos_token_id=None), 0.005)
        return first, good

    first, good = asyncio.run(main())
    assert good.tokens == solo("chain", prompts[3], {})[:8]
    assert first == solo("chain", prompts[2], {})[: len(first)]
    assert seen[0].reason == "cancelled" and 0 < len(seen[0].tokens) < 60
    require_empty(engine)


def test_an_event_loop_that_ends_leaves_nothing_at_work():
    engine, prompts = engine_of(), prompts_of(3)
    step, tasks = engine.step, []
    engine.step = lambda: (time.sleep(0.02), step())[1]

    async def main():
        tasks.extend(asyncio.create_task(engine.generate_async(prompt, max_new_tokens=99)) for prompt in prompts)
        await asyncio.sleep(0.05)
        raise OSError("the program ends")

    with pytest.raises(OSError, match="the program ends"):
        asyncio.run(main())
    assert all(task.cancelled() for task in tasks)
    require_empty(engine)
    engine.step = step
    handle = asyncio.run(engine.generate_async(prompts[0], max_new_tokens=5))
    assert handle.tokens == solo("chain", prompts[0], {})[:5]


def test_another_event_loop_is_refused_while_one_is_at_work():
    engine, prompt = engine_of(), prompts_of(1)[0]

    async def main():
        task = asyncio.create_task(engine.generate_async(prompt, max_new_tokens=30))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="at work for another event loop"):
            await asyncio.to_thread(lambda: asyncio.run(engine.generate_async(prompt)))
        return await task

    assert asyncio.run(main()).reason == "length"
    require_empty(engine)
