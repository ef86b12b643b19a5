"""The evaluation engine against one question at a time: forwards without a cache, and LLaVA's own generate()."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from llava_compodistill.eval.engine import Engine
from llava_compodistill.eval.requests import Answer, Continuation, FirstWord, Likelihood
from llava_compodistill.eval.sequences import WholeSequences

VERSION = "qwen_1_5"
PROMPTS = ["What is this?", "Is the red circle left of the blue square? Answer yes or no.", "Describe the image."]
ANSWERS = ["a small red circle", "Yes", "a large blue square above a small green star"]


@pytest.fixture(scope="module")
def engine(world, tmp_path_factory):
    """A random teacher of the test world, with weights large enough to answer different things."""
    import factory

    from llava_compodistill.hosts.llava import register

    register(train=True)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world["tokenizer"])
    model = factory.make_model(world["siglip"], vocab=len(tokenizer), dtype=torch.float32, seed=3)
    return Engine(model, tokenizer, version=VERSION, batch_size=4)


@pytest.fixture(scope="module")
def images(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for number, color in enumerate([(255, 0, 0), (0, 80, 200), (10, 240, 10)]):
        image = Image.new("RGB", (60, 60), color)
        image.paste((255, 255, 255), (10 * number, 5, 30 + 10 * number, 40))
        paths.append(str(folder / f"{number}.png"))
        image.save(paths[-1])
    return paths


def test_responses_are_those_of_whole_sequences(engine, images):
    """Behind a prefix in the cache or with it: of every kind that both can answer, in batches of mixed lengths."""
    places = [(image, prompt) for prompt in PROMPTS for image in images]
    requests = [Likelihood(*place, answer) for answer in ANSWERS for place in places]
    requests += [Continuation(*place, ANSWERS[0]) for place in places]
    requests += [FirstWord(*place, ("Yes", "No")) for place in places]
    found = engine.run(requests)
    told = {}
    for size in (1, 7):
        whole = WholeSequences(engine.model, engine.tokenizer, version=VERSION, batch_size=size)
        expected = whole.run(requests, done=told.__setitem__)
        assert told == dict(enumerate(expected))
        assert [type(value) for value in found] == [type(value) for value in expected]
        assert np.hstack(found) == pytest.approx(np.hstack(expected), abs=2e-5)
    likelihoods = found[: len(ANSWERS) * len(places)]
    assert len({round(value, 3) for value in likelihoods}) > len(likelihoods) / 2


def test_whole_sequences_run_inside_what_an_analysis_makes(engine, images):
    from llava_compodistill.record.sight import without_sight

    every = range(engine.model.config.num_hidden_layers)
    blind = WholeSequences(
        engine.model, engine.tokenizer, version=VERSION,
        inside=lambda recorder: without_sight(engine.model, every, lambda: recorder.batch),
    )  # fmt: skip
    requests = [Likelihood(image, PROMPTS[0], ANSWERS[0]) for image in images]
    seen, unseen = engine.run(requests), blind.run(requests)
    assert len(set(seen)) == 3 and unseen == pytest.approx([unseen[0]] * 3, abs=1e-6)
    assert engine.run(requests) == seen  # nothing is left behind
    with pytest.raises(ValueError, match="WholeSequences cannot answer Answer"):
        blind.run([Answer(images[0], PROMPTS[0])])


def prompt_ids(engine, prompt, answer=None):
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token

    conversation = conv_templates[VERSION].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{prompt}")
    conversation.append_message(conversation.roles[1], answer)
    return tokenizer_image_token(conversation.get_prompt(), engine.tokenizer, -200, return_tensors="pt")[None]


def pixels_of(engine, image):
    from llava.mm_utils import process_images

    processor = engine.model.get_vision_tower().image_processor
    return process_images([Image.open(image).convert("RGB")], processor, engine.model.config)


def test_first_words_are_the_first_tokens_of_answers(engine, images):
    words = ("Yes", "No", "a")
    requests = [FirstWord(image, prompt, words) for image in images for prompt in PROMPTS]
    found = engine.run(requests)
    tokens = [engine.tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]
    assert len(set(tokens)) == 3
    for request, values in zip(requests, found, strict=True):
        with torch.no_grad():
            logits = engine.model(prompt_ids(engine, request.prompt), images=pixels_of(engine, request.image)).logits
        expected = torch.log_softmax(logits[0, -1].double(), dim=-1)[tokens]
        assert values == pytest.approx(expected.tolist(), abs=2e-5)


def test_continuations_know_what_is_greedy(engine, images):
    greedy = engine.run([Answer(images[0], PROMPTS[0], 3)])[0]
    found = engine.run([Continuation(images[0], PROMPTS[0], text) for text in (greedy, "a blue star")])
    for text, (value, is_greedy) in zip((greedy, "a blue star"), found, strict=True):
        mean = engine.run([Likelihood(images[0], PROMPTS[0], text)])[0]
        assert value == mean
        count = len(engine.tokenizer(text, add_special_tokens=False).input_ids) + 1  # the end included
        before = prompt_ids(engine, PROMPTS[0])
        ids = prompt_ids(engine, PROMPTS[0], text)[:, : before.shape[1] + count]
        with torch.no_grad():
            logits = engine.model(ids, images=pixels_of(engine, images[0])).logits[0, -count - 1 : -1].double()
        targets = ids[0, -count:]
        expected = torch.log_softmax(logits, dim=1).gather(1, targets[:, None]).mean()
        assert value == pytest.approx(float(expected), abs=2e-5)
        assert is_greedy is bool((logits.argmax(dim=1) == targets).all())


def generate_alone(engine, image, prompt, limit, **given):
    """LLaVA's way: one question a call, image included."""
    model, tokenizer = engine.model, engine.tokenizer
    tokens = model.generate(
        prompt_ids(engine, prompt), **({"images": pixels_of(engine, image)} | given), do_sample=False,
        max_new_tokens=limit, use_cache=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()


def test_answers_are_those_of_one_question_at_a_time(engine, images):
    limits = [1, 9, 5]
    requests = [Answer(image, p, limit) for image in images for p, limit in zip(PROMPTS, limits, strict=True)]
    found = engine.run(requests)
    expected = [generate_alone(engine, r.image, r.prompt, r.max_new_tokens) for r in requests]
    assert found == expected
    assert len(set(found)) > 2 and any(len(text.split()) > 2 for text in found)


def test_rows_that_pad_the_vocabulary_are_never_answered(world, images):
    """They cannot be decoded; a model that has not learned much may well find one the likeliest."""
    import factory
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world["tokenizer"])
    model = factory.make_model(world["siglip"], vocab=len(tokenizer) + 300, dtype=torch.float32, seed=3)
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer) :] *= 50
    padded = Engine(model, tokenizer, version=VERSION, batch_size=4)
    found = padded.run([Answer(image, prompt, 5) for image in images for prompt in PROMPTS])
    assert all(isinstance(text, str) for text in found) and any(found)
    assert padded.run([Continuation(images[0], PROMPTS[0], found[0])])[0][1] in (True, False)


def test_mixed_requests_come_back_in_their_order(engine, images):
    requests = [
        Answer(images[1], PROMPTS[0], 4),
        Likelihood(images[0], PROMPTS[2], ANSWERS[0]),
        FirstWord(images[1], PROMPTS[1], ("Yes", "No")),
        Likelihood(images[1], PROMPTS[2], ANSWERS[0]),
    ]
    told = {}
    found = engine.run(requests, done=told.__setitem__)
    assert told == dict(enumerate(found))
    assert [type(value) for value in found] == [str, float, list, float]
    for request, value in zip(requests, found, strict=True):
        alone = engine.run([request])[0]
        assert alone == (pytest.approx(value, abs=2e-5) if not isinstance(value, str) else value)


def test_each_image_is_encoded_once(engine, images, monkeypatch):
    seen = []
    encode = engine.model.encode_images
    monkeypatch.setattr(engine.model, "encode_images", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    engine.run([Likelihood(image, prompt, answer) for answer in ANSWERS for prompt in PROMPTS for image in images])
    assert seen == [3]


def test_images_cut_into_crops(engine, images, tmp_path):
    """anyres: as many visual tokens as an image's shape asks for, and still one pass an image. (With a CLIP tower:
    LLaVA's process_anyres_image cannot take SigLIP's image processor.)"""
    import factory

    model = factory.make_model(
        factory.save_tower(tmp_path / "clip", "clip"), vocab=len(engine.tokenizer), dtype=torch.float32, seed=3
    )
    config, size = model.config, model.get_vision_tower().config.image_size
    config.image_aspect_ratio, config.mm_patch_merge_type = "anyres", "spatial_unpad"
    config.image_grid_pinpoints = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
    model.get_model().image_newline = torch.nn.Parameter(torch.randn(config.hidden_size))
    wide = str(tmp_path / "wide.png")
    Image.open(images[0]).resize((3 * size, size)).save(wide)
    paths = [images[0], wide, images[1]]
    crops = Engine(model, engine.tokenizer, version=VERSION, batch_size=4)
    lengths, read = [], crops._read

    def measured(before, some):
        caches = read(before, some)
        lengths.append(caches.length)
        return caches

    crops._read = measured
    requests = [FirstWord(path, prompt, ("Yes", "No")) for path in paths for prompt in PROMPTS]
    requests += [Answer(path, PROMPTS[0], 6) for path in paths]
    found = crops.run(requests)
    assert len(lengths) == 3 and len(set(lengths)) == 2
    tokens = [engine.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No")]
    for request, values in zip(requests, found, strict=True):
        given = {"images": pixels_of(crops, request.image), "image_sizes": [Image.open(request.image).size]}
        if isinstance(request, Answer):
            assert values == generate_alone(crops, request.image, request.prompt, 6, **given)
            continue
        with torch.no_grad():
            logits = model(prompt_ids(crops, request.prompt), **given).logits
        assert values == pytest.approx(torch.log_softmax(logits[0, -1].double(), dim=-1)[tokens].tolist(), abs=2e-5)


def test_batches_are_halved_when_the_memory_does_not_hold_them(engine, images, monkeypatch, caplog):
    small = Engine(engine.model, engine.tokenizer, version=VERSION, batch_size=8)
    requests = [Likelihood(image, prompt, answer) for answer in ANSWERS for prompt in PROMPTS for image in images]
    expected = small.run(requests)
    forward, read, sizes = small._forward, small._read, []

    def limited(rows, caches):
        sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.cuda.OutOfMemoryError("no more")
        return forward(rows, caches)

    def limited_read(before, some):
        if len(some) > 2:
            raise torch.cuda.OutOfMemoryError("no more")
        return read(before, some)

    monkeypatch.setattr(small, "_forward", limited)
    assert small.run(requests) == pytest.approx(expected, abs=2e-5)
    assert small.batch_size == 2 and set(sizes) == {8, 4, 2, 1}
    assert "Out of GPU memory with 8 at once: going on with 4" in caplog.text
    small.batch_size = 8
    monkeypatch.setattr(small, "_read", limited_read)
    assert small.run(requests) == pytest.approx(expected, abs=2e-5) and small.batch_size == 1
    monkeypatch.setattr(small, "_forward", lambda rows, caches: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        small.run(requests)


def test_bfloat16_models_answer_as_in_float32_up_to_rounding(engine, images):
    """The head is widened: the values are no multiples of what bfloat16 logits can tell apart."""
    narrow = Engine(copy.deepcopy(engine.model).bfloat16(), engine.tokenizer, version=VERSION, batch_size=4)
    requests = [Likelihood(image, PROMPTS[2], answer) for image in images for answer in ANSWERS]
    requests += [FirstWord(image, PROMPTS[1], ("Yes", "No")) for image in images]
    found, expected = narrow.run(requests), engine.run(requests)
    assert np.allclose(np.hstack(found), np.hstack(expected), atol=0.2)
    assert not np.array_equal(np.hstack(found), np.hstack(expected))
    assert narrow._weight.dtype == torch.float32


def test_letters_that_tie_at_16_bits_are_told_apart(engine, images):
    """The rows of "Yes" and "No" in the head differ by less than bfloat16 resolves in a logit."""
    model = copy.deepcopy(engine.model).to(torch.bfloat16)
    half = Engine(model, engine.tokenizer, version=VERSION, batch_size=4)
    first, second = (engine.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No"))
    low, high = sorted((first, second))
    states = []
    half._likeliest = lambda hidden, exact=False: (states.append(hidden), Engine._likeliest(half, hidden, exact))[1]
    requests = [Answer(image, PROMPTS[1], 1, exact=exact) for image in images for exact in (True, False)]
    half.run(requests)
    states = torch.cat(states).float()
    direction = states.mean(dim=0)
    direction = 40 * direction / direction.square().sum()  # a logit of about 40, above all others
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[low] = head[high] = direction.to(torch.bfloat16)
        # A hundredth more in one place, which adds some thousandths to the logits of all images.
        share = (direction * states).min(dim=0).values
        place = int(torch.where(share < 0.6, share, -1.0).argmax())
        assert share[place] > 0.1
        head[high, place] *= 1.01
    half = Engine(model, engine.tokenizer, version=VERSION, batch_size=4)
    answers = half.run(requests)
    names = {engine.tokenizer.decode([token]).strip(): token for token in (low, high)}
    assert [names[text] for text in answers[::2]] == [high] * 3  # in float32
    assert [names[text] for text in answers[1::2]] == [low] * 3  # a tie, which argmax gives to the first
    by_logits = half.run([FirstWord(image, PROMPTS[1], ("Yes", "No")) for image in images])
    order = 1 if high == second else -1
    assert all(order * (values[1] - values[0]) > 0 for values in by_logits)  # as `choice-logits` has always decided


# ---------------------------------------------------------------------------------------------------------------------
# Templates in the style of v0
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["default", "v0", "llava_v0", "v0_mmtag"])
def test_templates_without_an_end_token(engine, images, version):
    """LLaVA's labels are also those of the roles there, from before the image on."""
    tokenizer = copy.deepcopy(engine.tokenizer)
    old = Engine(engine.model, tokenizer, version=version, batch_size=4)
    place = images[0], PROMPTS[0]
    asked, told = (old._tokens(0, request) for request in (Answer(*place), Likelihood(*place, "Yes")))
    assert tokenizer.decode(asked.behind).endswith("### Assistant:")
    assert asked.ids == told.ids[: len(asked.ids)] and set(asked.labels) == {-100}
    learned = [label for label in told.labels if label != -100]
    assert told.ids[len(asked.ids) :] == learned and tokenizer.decode(learned).split() == ["Yes", "###"]
    requests = [Answer(*place, 3), Likelihood(*place, "Yes"), FirstWord(*place, ("Yes", "No"))]
    text, likelihood, words = old.run(requests)
    assert isinstance(text, str) and likelihood < 0 and len(set(words)) == 2
    whole = WholeSequences(engine.model, tokenizer, version=version).run(requests[1:])
    assert np.hstack([likelihood, words]) == pytest.approx(np.hstack(whole), abs=2e-5)
    said = tokenizer("Red\n### Human: And", add_special_tokens=False).input_ids
    old._continued = lambda *_: ([said], [False])
    assert old.run(requests[:1]) == ["Red"]  # the next turn is none of the answer


def test_one_that_cannot_be_asked_is_no_end_for_the_others(engine, images, monkeypatch):
    from llava_compodistill.errors import DataError, SampleError

    original = engine._preprocess

    def preprocess(sources, *args, **options):
        if "unaskable" in sources[0][0]["value"]:
            raise SampleError("no label is left to learn from")
        return original(sources, *args, **options)

    monkeypatch.setattr(engine, "_preprocess", preprocess)
    requests = [Answer(images[0], PROMPTS[0], 2), Answer(images[0], "unaskable", 2)]
    found = engine.run(requests, keep_going=True)
    assert isinstance(found[0], str) and isinstance(found[1], DataError) and "no label is left" in str(found[1])
    with pytest.raises(SampleError):
        engine.run(requests)
