"""What a client gets from a real model behind two stages."""

from __future__ import annotations

import random

import pytest
from penstock.v1 import generation_pb2 as pb

from services.local.number_format import automatic_formats
from tests.support.client import Client, make_request

GREEDY = {"temperature": 0.0}
CAPITAL = "What is the capital of Germany?"


def test_a_question_is_answered_sensibly(client: Client) -> None:
    answer = client.generate(chat=CAPITAL, sampling=GREEDY | {"max_tokens": 40})
    assert "Berlin" in answer.text
    assert answer.finish_reason == pb.FINISH_REASON_STOP


def test_a_prompt_is_continued_as_it_is(client: Client) -> None:
    prompt = "The days of the week are Monday, Tuesday,"
    answer = client.generate(prompt=prompt, sampling=GREEDY | {"max_tokens": 8})
    assert answer.text.startswith(" Wednesday, Thursday")


def test_text_and_token_ids_of_a_prompt_say_the_same(client: Client) -> None:
    sampling = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
    answer = client.generate(prompt="Once upon a time", sampling=sampling)
    ids = client.generation.Tokenize(pb.TokenizeRequest(prompt="Once upon a time")).token_ids
    same = client.generate(token_ids=ids, sampling=sampling)
    text = client.generation.Detokenize(pb.DetokenizeRequest(token_ids=answer.token_ids)).text
    assert same.token_ids == answer.token_ids
    assert answer.text == text


def test_the_answer_streams_and_only_the_last_message_ends_it(client: Client) -> None:
    answer = client.generate(prompt="Once upon a time", sampling={"max_tokens": 32})
    *before, last = answer.responses
    assert len(answer.responses) > 8
    assert all(one.finish_reason == pb.FINISH_REASON_UNSPECIFIED for one in before)
    assert not any(one.HasField("usage") for one in before)
    assert last.finish_reason != pb.FINISH_REASON_UNSPECIFIED


def test_usage_counts_tokens_and_time(client: Client) -> None:
    sampling = {"max_tokens": 20, "ignore_eos": True}
    answer = client.generate(prompt="Once upon a time", sampling=sampling)
    ids = client.generation.Tokenize(pb.TokenizeRequest(prompt="Once upon a time")).token_ids
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(answer.token_ids) == 20
    assert answer.usage.prefill_duration.ToNanoseconds() > 0
    assert answer.usage.decode_duration.ToNanoseconds() > 0
    assert answer.finish_reason == pb.FINISH_REASON_LENGTH


def test_a_chat_is_tokenised_as_generate_does_it(client: Client) -> None:
    messages = [pb.ChatMessage(role="user", content=CAPITAL)]
    ids = client.generation.Tokenize(pb.TokenizeRequest(messages=messages)).token_ids
    answer = client.generate(messages=messages, sampling={"max_tokens": 1})
    assert answer.usage.prompt_tokens == len(ids)


def test_a_long_system_prompt_is_computed_once_and_answered_alike(client: Client) -> None:
    rules = " ".join(f"Rule {number}: mention each river only once." for number in range(40))
    messages = [
        pb.ChatMessage(role="system", content=rules),
        pb.ChatMessage(role="user", content="Name three rivers."),
    ]
    sampling = GREEDY | {"max_tokens": 24, "ignore_eos": True, "logprobs": 2}
    first, second = (client.generate(messages=messages, sampling=sampling) for _ in range(2))
    assert first.usage.prompt_tokens > 400
    assert first.usage.cached_tokens < 32  # at most the template's own words
    assert 0 < second.usage.prompt_tokens - second.usage.cached_tokens <= 16
    assert second.text == first.text
    assert second.logprobs == first.logprobs
    messages[1].content = "Name three mountains."
    other = client.generate(messages=messages, sampling=sampling)
    assert other.usage.cached_tokens > 400 - 32
    assert other.text != first.text
    mesh = client.mesh()
    assert mesh.prompt_tokens > mesh.cached_tokens >= 2 * 368


def test_ignore_eos_goes_on_past_the_end(client: Client) -> None:
    sampling = GREEDY | {"max_tokens": 40, "ignore_eos": True}
    answer = client.generate(chat=CAPITAL, sampling=sampling)
    assert len(answer.token_ids) == 40
    assert answer.finish_reason == pb.FINISH_REASON_LENGTH


def test_a_stop_string_ends_the_answer_before_it(client: Client) -> None:
    prompt = "The days of the week are Monday, Tuesday,"
    sampling = GREEDY | {"max_tokens": 60, "stop": ["Friday"]}
    answer = client.generate(prompt=prompt, sampling=sampling)
    assert answer.text == " Wednesday, Thursday, "
    assert answer.finish_reason == pb.FINISH_REASON_STOP


def test_a_stop_token_ends_the_answer_and_is_not_shown(client: Client) -> None:
    prompt = "The days of the week are Monday, Tuesday,"
    friday = client.generation.Tokenize(pb.TokenizeRequest(prompt=" Friday")).token_ids
    assert len(friday) == 1
    sampling = GREEDY | {"max_tokens": 60, "stop_token_ids": friday}
    answer = client.generate(prompt=prompt, sampling=sampling)
    assert "Thursday" in answer.text
    assert "Friday" not in answer.text
    assert answer.finish_reason == pb.FINISH_REASON_STOP


def test_logprobs_come_for_every_token_likeliest_first(client: Client) -> None:
    sampling = GREEDY | {"max_tokens": 6, "logprobs": 3, "ignore_eos": True}
    answer = client.generate(prompt="The capital of France is", sampling=sampling)
    assert [entry.chosen.token_id for entry in answer.logprobs] == answer.token_ids
    for entry in answer.logprobs:
        tops = [top.logprob for top in entry.top]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert entry.top[0] == entry.chosen
        assert tops[0] < 0


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(client: Client) -> None:
    def sample(seed: int) -> list[int]:
        sampling = {"max_tokens": 24, "temperature": 1.0, "seed": seed, "ignore_eos": True}
        return client.generate(prompt="Once upon a time", sampling=sampling).token_ids

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)


def test_answers_do_not_depend_on_who_else_is_in_the_batch(client: Client) -> None:
    rng = random.Random(1)
    requests = [a_mixed_request(rng, index) for index in range(16)]
    alone = [client.send(request).token_ids for request in requests]
    together = [answer.token_ids for answer in client.send_all(requests)]
    assert together == alone


def test_many_requests_in_one_call_are_answered_as_each_alone(client: Client) -> None:
    rng = random.Random(3)
    requests = [a_mixed_request(rng, index) for index in range(16)]
    alone = [client.send(request) for request in requests]
    call = client.generation.GenerateMany(
        (pb.GenerateManyRequest(id=i, request=request) for i, request in enumerate(requests)),
        timeout=60,
    )
    texts, token_ids = [""] * 16, [list[int]() for _ in requests]
    num_answers = num_messages = 0
    for response in call:
        num_messages += 1
        for answer in response.answers:
            num_answers += 1
            texts[answer.id] += answer.response.text
            token_ids[answer.id] += answer.response.token_ids
    assert token_ids == [answer.token_ids for answer in alone]
    assert texts == [answer.text for answer in alone]
    assert num_messages < num_answers


def test_a_long_prompt_is_prefilled_in_chunks_to_the_same_answer(client: Client) -> None:
    """More tokens than fit into one micro-batch, among requests that decode meanwhile."""
    rng = random.Random(2)
    long = make_request(
        token_ids=[rng.randrange(1000, 40000) for _ in range(1200)],
        sampling=GREEDY | {"max_tokens": 8, "ignore_eos": True},
    )
    others = [a_mixed_request(rng, index) for index in range(4)]
    alone = client.send(long).token_ids
    assert client.send_all([*others, long])[-1].token_ids == alone


def test_the_model_is_listed_with_what_a_client_must_know(client: Client) -> None:
    (model,) = client.generation.ListModels(pb.ListModelsRequest()).models
    assert model.name == "smollm2-135m-instruct"
    assert model.num_stages == 2
    assert model.number_format == automatic_formats()[0]
    assert model.vocab_size == 49152
    assert model.has_chat_template
    assert model.ready


@pytest.mark.parametrize("text", ["Hello, world", "Grüße aus Köln", "日本語 🌊 العربية", " \n\t x"])
def test_text_survives_the_way_to_tokens_and_back(client: Client, text: str) -> None:
    ids = client.generation.Tokenize(pb.TokenizeRequest(prompt=text)).token_ids
    assert client.generation.Detokenize(pb.DetokenizeRequest(token_ids=ids)).text == text


def a_mixed_request(rng: random.Random, index: int) -> pb.GenerateRequest:
    """Greedy and sampled, short and long, with and without penalties and log probabilities."""
    sampling: dict[str, object] = {"max_tokens": rng.randint(4, 32), "ignore_eos": True}
    if index % 2:
        sampling |= {"temperature": 0.0}
    else:
        sampling |= {"temperature": rng.uniform(0.5, 1.5), "seed": index, "top_p": 0.9}
    if index % 3 == 0:
        sampling |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3}
    if index % 5 == 0:
        sampling |= {"logprobs": 2, "top_k": 40}
    token_ids = [rng.randrange(1000, 40000) for _ in range(rng.randint(1, 120))]
    return make_request(token_ids=token_ids, sampling=sampling)


@pytest.mark.parametrize(
    "drawn", [{"temperature": 0.0}, {"temperature": 0.7, "seed": 5, "top_k": 1}]
)
def test_guessed_tokens_are_those_that_come_one_at_a_time(
    client: Client, drawn: dict[str, float]
) -> None:
    # In every number format the model goes on with the same two colours for ever.
    prompt = "red green blue yellow " * 4 + "red green"
    ids = list(client.generation.Tokenize(pb.TokenizeRequest(prompt=prompt)).token_ids)
    before = client.mesh()
    sampling = drawn | {"ignore_eos": True}
    answer = client.generate(token_ids=ids, sampling=sampling | {"max_tokens": 24})
    after = client.mesh()
    assert after.tokens_guessed > before.tokens_guessed
    assert after.tokens_guessed_right > before.tokens_guessed_right
    for token_id in answer.token_ids:
        # With the only token that it may generate a request leaves nothing to guess.
        one = client.generate(token_ids=ids, sampling=sampling | {"max_tokens": 1})
        assert list(one.token_ids) == [token_id]
        ids.append(token_id)
    assert client.mesh().tokens_guessed == after.tokens_guessed
