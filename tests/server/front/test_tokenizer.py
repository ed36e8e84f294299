"""Text in and out: incremental decoding against decoding whole, stop strings, and chat templates."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from inference_server.front.chat_template import ChatTemplate, ChatTemplateError
from inference_server.front.detokenizer import StopStrings, WindowDetokenizer
from inference_server.front.tokenizer import ModelTokenizer, TokenizerError

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Straße, naïve, 東京へようこそ, 🙂🚀👩‍👩‍👧, مرحبا بالعالم, Привет",
    "def f(x):\n\treturn {'a': [x, x ** 2]}  # done",
]


def pieces(detokenizer, ids) -> list[str]:
    return [*(detokenizer.add(number) for number in ids), detokenizer.finish()]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> ModelTokenizer:
    return ModelTokenizer(tokenizer_folder)


@given(ids=st.lists(st.integers(0, 385), max_size=60))
@settings(max_examples=500, deadline=None)
def test_byte_level_pieces_add_up_to_the_whole_text(tokenizer: ModelTokenizer, ids: list[int]) -> None:
    assert "".join(pieces(tokenizer.detokenizer(), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_of_a_valid_text_holds_a_replacement_character(tokenizer: ModelTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = pieces(tokenizer.detokenizer(), ids)
    assert "".join(parts) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert sum(map(bool, parts)) > len(text) / 4  # and is not held back to the end


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    """A vocabulary as Llama 2's: word starts marked with ▁, unknown characters spelled in byte tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["▁the▁quick▁brown▁fox▁▁jumps"], trainer)
    return tokenizer


@given(words=st.lists(st.sampled_from(["the", " quick", "  brown", "東京", "🙂", "é", "fox\n", "</s>"]), max_size=40))
@settings(max_examples=300, deadline=None)
def test_pieces_of_a_vocabulary_with_byte_fallback_add_up_too(sentencepiece_like: Tokenizer, words: list[str]) -> None:
    ids = [number for word in words for number in sentencepiece_like.encode(word).ids]
    special = frozenset({1, 2})

    def decode(some) -> str:
        return sentencepiece_like.decode(list(some), skip_special_tokens=True)

    parts = pieces(WindowDetokenizer(decode, special), ids)
    assert "".join(parts) == decode(ids)


def test_work_per_token_does_not_grow_with_the_text(tokenizer: ModelTokenizer, sentencepiece_like: Tokenizer) -> None:
    def cost(detokenizer, ids) -> tuple[float, float]:
        times = []
        for part in (ids[: len(ids) // 10], ids[-len(ids) // 10 :]):
            for number in ids[: (len(ids) if times else 0)]:
                detokenizer.add(number)
            begin = time.perf_counter()
            for number in part:
                detokenizer.add(number)
            times.append(time.perf_counter() - begin)
        return times[0], times[1]

    text = " ".join(TEXTS) * 100
    first, last = cost(tokenizer.detokenizer(), tokenizer.encode(text, add_special_tokens=False))
    assert last < 5 * first + 0.01
    ids = sentencepiece_like.encode("the quick brown 東京 " * 300).ids
    first, last = cost(WindowDetokenizer(lambda some: sentencepiece_like.decode(list(some)), frozenset()), ids)
    assert last < 5 * first + 0.01


@given(
    text=st.text(alphabet="abc", max_size=40),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=40, max_size=40),
)
@settings(max_examples=500)
def test_a_stop_string_is_found_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner, shown, stopped, at = StopStrings(stops), "", False, 0
    for cut in cuts:
        piece, stopped = scanner.add(text[at : at + cut])
        shown += piece
        at += cut
        assert text.startswith(shown)
        if stopped:
            break
    if not stopped:
        shown += scanner.finish()
    # The oracle: read character by character; the first stop string to be complete cuts the text at its beginning.
    expected = text
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            expected = text[: end - max(map(len, met))]
            break
    assert shown == expected
    assert stopped == (expected != text)


TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "blocks on lines of their own": "{{ bos_token }}{%- for m in messages %}\n    {%- if m.role == 'system' %}\n"
    "<<SYS>> {{ m.content | trim }}\n    {% else %}\n[{{ loop.index0 }}] {{ m.content }}{{ eos_token }}\n"
    "    {%- endif %}\n{%- endfor %}",
    "filters, namespace, loop controls, date": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}"
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.content is not defined %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }} {{ strftime_now('%Y') }}",
    "generation tag and absent variables": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{{ m.name or '' }}{% endfor %}{% if tools %}tools{% endif %}{{ enable_thinking | default('unset') }}"
    "{{ dict(a=1) }}",
}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi <b>there</b> & 'you'"}],
    [
        {"role": "system", "content": "  Be brief. \n"},
        {"role": "user", "content": "東京? 🙂"},
        {"role": "assistant", "content": "Yes\n"},
        {"role": "user", "content": "Why", "name": None},
    ],
]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_chat_template_renders_as_in_transformers(
    tokenizer_folder: Path, template: str, conversation: list[dict]
) -> None:
    from transformers import PreTrainedTokenizerFast

    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_folder / "tokenizer.json"), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    ours = ChatTemplate(template, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    for prompt in (True, False):
        for variables in ({}, {"enable_thinking": False}):
            expected = oracle.apply_chat_template(
                conversation, chat_template=template, add_generation_prompt=prompt, tokenize=False, **variables
            )
            assert ours.render(conversation, add_generation_prompt=prompt, variables=variables) == expected


def test_the_ids_of_a_chat_are_those_of_transformers(tokenizer_folder: Path, tokenizer: ModelTokenizer) -> None:
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(tokenizer_folder)
    for conversation in CONVERSATIONS:
        assert tokenizer.chat_template is not None
        ours = tokenizer.encode(tokenizer.chat_template.render(conversation), add_special_tokens=False)
        theirs = oracle.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ours == theirs


def test_a_template_can_refuse_and_cannot_escape() -> None:
    refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        refusing.render([{"role": "user", "content": ""}])
    with pytest.raises(ChatTemplateError, match="compiled"):
        ChatTemplate("{% for %}", {})
    for attack in (
        "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ):
        with pytest.raises(ChatTemplateError):
            ChatTemplate(attack, {}).render([{"role": "user", "content": ""}])


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        ModelTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read"):
        ModelTokenizer(tmp_path)
