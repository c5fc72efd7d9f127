"""What kind of token an id is, by its text."""

from __future__ import annotations

from megatron_rl.data.tokenizer import character_tokenizer, token_kind


class Texts:
    """A tokenizer with one token a text."""

    all_special_tokens = ("<|end|>",)
    texts = ("<|end|>", " \n", " 12", "½", "+", " <=", " the", "\\frac", "x2", ").", "\ufffd", "≥")

    def decode(self, ids: list[int]) -> str:
        return self.texts[ids[0]]


def test_kinds_of_texts() -> None:
    tokenizer = Texts()
    kinds = [token_kind(tokenizer, i) for i in range(len(Texts.texts))]
    expected = "special space number sign operator operator word word word sign sign operator"
    assert kinds == expected.split()


def test_kinds_of_the_countdown_game() -> None:
    tokenizer = character_tokenizer()
    kinds = {text: token_kind(tokenizer, token_id) for text, token_id in tokenizer.get_vocab().items()}
    assert {kinds[text] for text in "0123456789"} == {"number"} and {kinds[text] for text in "+-*/="} == {"operator"}
    assert {kinds[text] for text in "(),:"} == {"sign"} and kinds["<eos>"] == kinds["<pad>"] == "special"
