from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
from collections import Counter
from itertools import permutations, product

import pytest
from transformers import AutoTokenizer

from megatron_rl.config import parse_config
from megatron_rl.data.countdown import countdown_solutions
from megatron_rl.data.cursor import PromptCursor
from megatron_rl.data.problems import load_prompts
from megatron_rl.data.tokenizer import build_tokenizer, encode_prompt, vocab_size
from megatron_rl.errors import DataError
from megatron_rl.grading.rules import countdown
from megatron_rl.types import Prompt

HF = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


def make_config(data, seed=1, **hf):
    return parse_config({"seed": seed, "model": {"hf_config": HF | hf}, "data": data})


COUNTDOWN = make_config({"type": "countdown", "num_train": 300, "num_eval": 40})


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(COUNTDOWN)


@pytest.fixture(scope="module")
def problems(tokenizer):
    return load_prompts(COUNTDOWN, tokenizer)


def test_character_tokenizer_round_trip(tokenizer, tmp_path):
    text = "10,5,7=22:(10+5)*7/1-0"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for t in (tokenizer, again):
        ids = t.encode(text, add_special_tokens=False)
        assert len(ids) == len(text) and t.decode(ids) == text
        assert vocab_size(t) == 21 and t.eos_token == "<eos>" and t.pad_token_id != t.eos_token_id
        assert t.decode([t.eos_token_id]) == "<eos>"
    assert again.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("x")


def test_tokenizer_that_cannot_fit_or_does_not_exist(tmp_path):
    with pytest.raises(DataError, match=r"vocab_size=20 is below the tokenizer's 21"):
        build_tokenizer(make_config({"type": "countdown"}, vocab_size=20))
    with pytest.raises(DataError, match=r"data\.tokenizer: model\.hf_config brings no tokenizer"):
        build_tokenizer(make_config({"type": "jsonl", "train_path": "x"}, vocab_size=100))
    with pytest.raises(DataError, match="is no folder"):
        build_tokenizer(make_config({"type": "jsonl", "train_path": "x", "tokenizer": "nowhere/1"}, vocab_size=100))


def test_countdown_rows_are_deterministic_disjoint_and_well_formed(tokenizer, problems):
    assert load_prompts(COUNTDOWN, tokenizer) == problems
    other = load_prompts(COUNTDOWN.model_copy(update={"seed": 2}), tokenizer)
    assert len({p.token_ids for p in other.train} & {p.token_ids for p in problems.train}) < 150
    assert [p.prompt_id for p in problems.train + problems.eval] == list(range(340))

    def key(prompt):
        problem = json.loads(prompt.answer)
        assert tokenizer.decode(list(prompt.token_ids)) == (
            ",".join(map(str, problem["numbers"])) + f"={problem['target']}:"
        )
        assert len(problem["numbers"]) == 3 and 1 <= min(problem["numbers"]) and max(problem["numbers"]) <= 9
        assert 1 <= problem["target"] <= 50
        return (*sorted(problem["numbers"]), problem["target"])

    held_out = [key(p) for p in problems.eval]
    assert len(set(held_out)) == 40
    assert not set(held_out) & {key(p) for p in problems.train}


def test_solutions_are_correct_and_varied(tokenizer, problems):
    solutions = countdown_solutions(problems.train, tokenizer, seed=3)
    texts = [tokenizer.decode(list(ids[:-1])) for ids in solutions]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in solutions)
    # graded by the verifier, which shares no code with the solver
    assert [countdown(text, p.answer) for text, p in zip(texts, problems.train, strict=True)] == [1.0] * 300
    assert countdown_solutions(problems.train[5:9], tokenizer, seed=3) == solutions[5:9]
    assert countdown_solutions(problems.train, tokenizer, seed=4) != solutions


def test_solver_finds_every_value_and_spelling_of_three_numbers(tokenizer):
    def brute(numbers, target):
        """The distinct syntax trees over three numbers that have the value, written with the fewest parentheses."""
        found = set()
        for (a, b, c), p, q in product(permutations(numbers), "+-*/", "+-*/"):
            for text in (f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})"):
                try:
                    value = eval(text)
                except ZeroDivisionError:
                    continue
                if abs(value - target) < 1e-9:
                    found.add(ast.unparse(ast.parse(text)).replace(" ", ""))
        return found

    prompt = Prompt(0, (1,), json.dumps({"numbers": [2, 4, 8], "target": 4}), "countdown")
    drawn = set()
    for seed in range(600):
        (ids,) = countdown_solutions([prompt], tokenizer, seed)
        drawn.add(tokenizer.decode(list(ids[:-1])))
    expected = brute((2, 4, 8), 4)
    # a+(b+c) and a*(b/c) are the solver's a+b+c and a*b/c, so its spellings are those without needless parentheses
    assert drawn <= expected and drawn >= {text for text in expected if "(" not in text} and "8/(4-2)" in drawn


def test_solver_refuses_what_it_cannot_do(tokenizer):
    def prompt(numbers, target):
        return Prompt(7, (1,), json.dumps({"numbers": numbers, "target": target}), "countdown")

    with pytest.raises(DataError, match="prompt 7 .* has no solution"):
        countdown_solutions([prompt([1, 1, 1], 49)], tokenizer, 1)
    with pytest.raises(DataError, match="num_numbers to at most 4"):
        countdown_solutions([prompt([1, 2, 3, 4, 5], 15)], tokenizer, 1)


def test_countdown_limits_are_errors(tokenizer):
    with pytest.raises(DataError, match="raise that limit"):
        load_prompts(
            make_config({"type": "countdown", "num_train": 5, "num_eval": 0, "max_prompt_tokens": 7}), tokenizer
        )
    small = {"type": "countdown", "num_numbers": 2, "max_number": 2, "max_target": 2, "num_train": 1, "num_eval": 50}
    with pytest.raises(DataError, match="lower num_eval"):
        load_prompts(make_config(small), tokenizer)


@pytest.fixture
def jsonl(tmp_path, tokenizer):
    """Load `lines` as training data with the character tokenizer, which has no chat template unless one is given."""

    def load(lines, eval_lines=None, template=None, **options):
        train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
        train.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
        if eval_lines is not None:
            held_out.write_text("".join(json.dumps(line) + "\n" for line in eval_lines))
            options["eval_path"] = str(held_out)
        tokenizer.chat_template = template
        try:
            config = make_config({"type": "jsonl", "train_path": str(train), **options}, vocab_size=100)
            return load_prompts(config, tokenizer)
        finally:
            tokenizer.chat_template = None

    return load


def row(problem, answer="1", **more):
    return {"problem": problem, "answer": answer, **more}


def test_jsonl_fields_ids_and_suffix(jsonl, tokenizer):
    got = jsonl([row("1+1=", source="aime"), "\n", row("2+2", 4)], [row("3", {"a": 1})], suffix="=")
    assert [(p.prompt_id, p.answer, p.source) for p in got.train] == [(0, "1", "aime"), (1, "4", "train")]
    assert [(p.prompt_id, p.answer, p.source) for p in got.eval] == [(2, '{"a": 1}', "eval")]
    assert tokenizer.decode(list(got.train[0].token_ids)) == "1+1="


def test_jsonl_chat_template_and_system_prompt(jsonl, tokenizer):
    template = "{% for m in messages %}{{ '(' if m.role == 'system' else ':' }}{{ m.content }}{% endfor %}="
    got = jsonl([row("1+1")], template=template, system_prompt="0", suffix="*2")
    assert tokenizer.decode(list(got.train[0].token_ids)) == "(0:1+1*2="


def test_jsonl_overlong_prompts(jsonl, capsys):
    lines = [row("1"), row("12345"), row("3")]
    with pytest.raises(DataError, match=r"line 2: the prompt has 5 tokens.*overlong_prompts=drop"):
        jsonl(lines, max_prompt_tokens=4)
    got = jsonl(lines, [row("9")], max_prompt_tokens=4, overlong_prompts="drop")
    # dropping does not renumber, so sampling seeds stay with their problems
    assert [p.prompt_id for p in got.train + got.eval] == [0, 2, 3]
    assert "dropped 1 of 3 prompts above data.max_prompt_tokens=4" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"all 1 prompts exceed .*longest 5"):
        jsonl([row("12345")], max_prompt_tokens=4, overlong_prompts="drop")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no problem"),
        ([row("1"), '{"problem": '], "line 2: not JSON"),
        (["[1]\n"], "line 1: got list"),
        (
            [row("1"), {"problem": "2", "id": 3}],
            r"line 2: lacks answer \(or verl's .*\); it has problem, id",
        ),
        ([row(" ")], "line 1: `problem` must be a text"),
    ],
)
def test_jsonl_faults_name_the_line(jsonl, lines, message):
    with pytest.raises(DataError, match=message):
        jsonl(lines)


def test_jsonl_missing_file(tokenizer):
    with pytest.raises(DataError, match="no such file"):
        load_prompts(make_config({"type": "jsonl", "train_path": "gone.jsonl"}, vocab_size=100), tokenizer)


CHAT = "{% for m in messages %}{{ {'system': '(', 'user': ':', 'assistant': '='}[m.role] }}{{ m.content }}{% endfor %}="


def test_a_row_is_asked_with_its_whole_conversation(jsonl, tokenizer):
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    verl = {"prompt": [{"role": "system", "content": "3"}, *turns, {"role": "user", "content": "4"}],
            "reward_model": {"ground_truth": 8.0}}  # fmt: skip
    got = jsonl([verl, row("4", turns=turns), row("4", system="")], template=CHAT, system_prompt="0", suffix="*2")
    texts = [tokenizer.decode(list(p.token_ids)) for p in got.train]
    assert texts == ["(3:1+1=2:4*2=", "(0:1+1=2:4*2=", ":4*2="] and got.train[0].answer == "8"
    with pytest.raises(DataError, match=r"line 2: a conversation of 3 messages needs a chat template"):
        jsonl([row("4"), row("4", turns=turns)])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no system role') }}",
            r"tokenizer's chat template .*roles: system, user\): TemplateError: no system",
        ),
        ("{{ messages[0].content + 1 }}", r"tokenizer cannot take .*TypeError"),
        ("{% for %}", r"tokenizer's chat template .*TemplateSyntaxError"),
        ("unknown", r"tokenizer cannot take this conversation .*UNK"),  # tokenizers' plain Exception
        (None, r"tokenizer cannot take this conversation .*UNK"),
    ],
)
def test_what_the_tokenizer_or_its_template_refuses_names_the_row(jsonl, template, message):
    lines = [row("1"), row("x" if template is None else "1")]
    with pytest.raises(DataError, match=rf"train\.jsonl, line {1 if template else 2}: the {message}"):
        jsonl(lines, template=template, system_prompt="0" if template else None)


def test_a_broken_tokenizer_is_named(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "Nothing"}}'
    )  # a plain Exception
    config = make_config({"type": "jsonl", "train_path": "x", "tokenizer": str(tmp_path)}, vocab_size=100)
    with pytest.raises(DataError, match=r"holds no tokenizer that transformers can load \(Exception: "):
        build_tokenizer(config)


@pytest.mark.parametrize(
    ("single", "expected"), [("$A", "1"), ("<bos> $A", "<bos>1"), ("$A <eos>", "1"), ("<bos> $A <eos>", "<bos>1")]
)
def test_plain_prompts_keep_what_stands_before_and_not_what_ends_a_text(tokenizer, single, expected):
    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"bos_token": "<bos>"})
    ids = [(name, own.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    own.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    assert own.decode(own.encode("1")) == single.replace("$A", "1").replace(" ", "")
    assert own.decode(list(encode_prompt("1", None, own))) == expected


def test_answers_that_the_grader_cannot_read_are_counted_and_shown(tmp_path, tokenizer, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row("1", answer)) + "\n" for answer in ("2", "}{", "3", "")))
    config = make_config({"type": "jsonl", "train_path": str(path)}, vocab_size=100)
    load_prompts(config, tokenizer)
    assert not capsys.readouterr().out
    load_prompts(config, tokenizer, is_readable=str.isdigit)
    assert capsys.readouterr().out == (
        f"{path}: the verifier reads 2 of 4 gold answers in no way but as text, so only the same text is right there; "
        f"rewrite or drop them (docs/grading.md). First: {path}, line 2: '}}{{'\n"
    )


def test_reading_files_alone_needs_no_torch():
    code = "import sys; from megatron_rl.prepare import pipeline, commands; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def make_prompts(count):
    return [Prompt(i, (1,), "", "") for i in range(count)]


def ids(prompts):
    return [prompt.prompt_id for prompt in prompts]


def test_cursor_epochs_are_permutations_and_differ():
    cursor = PromptCursor(make_prompts(12), seed=5)
    epochs = [ids(cursor.take(6)) + ids(cursor.take(6)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert ids(PromptCursor(make_prompts(12), seed=6).take(12)) != epochs[0]


def test_cursor_resumes_where_it_was():
    straight, resumed = PromptCursor(make_prompts(10), seed=1), PromptCursor(make_prompts(10), seed=1)
    for _ in range(4):
        straight.take(4)
    state = json.loads(json.dumps(straight.state()))
    resumed.restore(state)
    assert [ids(straight.take(4)) for _ in range(5)] == [ids(resumed.take(4)) for _ in range(5)]
    with pytest.raises(DataError, match="seed=1, this run has 2"):
        PromptCursor(make_prompts(10), seed=2).restore(state)
    with pytest.raises(DataError, match="num_prompts=10, this run has 11"):
        PromptCursor(make_prompts(11), seed=1).restore(state)


def test_cursor_never_repeats_within_a_take_and_honours_exclusion():
    cursor = PromptCursor(make_prompts(7), seed=2)
    for _ in range(20):
        assert max(Counter(ids(cursor.take(5))).values()) == 1
    assert set(ids(cursor.take(3, exclude={0, 1, 2, 3}))) == {4, 5, 6}
    before = cursor.state()
    with pytest.raises(DataError, match="of the data set's 7 only 3"):
        cursor.take(4, exclude={0, 1, 2, 3})
    assert cursor.state() == before
    with pytest.raises(DataError, match="no training prompts"):
        PromptCursor([], seed=1)
