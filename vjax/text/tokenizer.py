"""Tokenizers from tokenizer.json, without transformers: the same ids, text and chat prompts as Hugging Face's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers

from vjax.errors import VjaxValidationError
from vjax.text.chat_template import render
from vjax.text.decode_stream import DecodeStream, StreamFactory


class Tokenizer:
    """A tokenizer as users of Hugging Face's know it; the methods that differ say so.

    `decode` never "cleans up" spaces around punctuation: text comes out as the model wrote it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str] | None = None,
        chat_templates: dict[str, str] | None = None,
        name_or_path: str = "",
    ):
        """
        Args:
            backend: Changed in place: truncation and padding, which tokenizer.json may switch on, are switched off.
            special_tokens: "bos_token" and so on -> its text.
            chat_templates: Jinja templates by name.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.name_or_path = name_or_path
        self.special_tokens_map = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self._streams = StreamFactory(backend)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name_or_path!r}, vocab_size={len(self)}, special_tokens={self.special_tokens_map})"

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    @property
    def is_fast(self) -> bool:
        return True

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that `decode` drops with skip_special_tokens, in rising order."""
        return sorted(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @property
    def all_special_tokens(self) -> list[str]:
        return [token for i in self.all_special_ids if (token := self.backend.id_to_token(i)) is not None]

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        return {token.content: i for i, token in sorted(self.backend.get_added_tokens_decoder().items())}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = self.encode(text, add_special_tokens)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def encode(self, text: str, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        """Token ids of a text; special tokens that stand in the text become their ids.

        Args:
            add_special_tokens: Add what tokenizer.json's post-processor adds, such as BOS.
            max_length: Most ids, at least 1: the first ones of the text are left out, as Hugging Face does with
                truncation_side="left". Those that the post-processor adds stay, where they are fewer.

        Raises:
            VjaxValidationError: It is not a str, or holds lone surrogates.
        """
        if not isinstance(text, str):
            raise VjaxValidationError(f"a text to encode must be a str, not {type(text).__name__}.", value=text)
        try:
            if max_length is None:
                return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
            return self._encode_end(text, add_special_tokens, max_length)
        except TypeError as e:
            raise VjaxValidationError(
                f"the text {text!r:.80} holds a lone surrogate, which is not Unicode text; remove it, for example with "
                'text.encode("utf-8", "replace").decode().',
                value=text,
            ) from e

    def encode_pair(self, text: str, pair: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of two texts, with what the post-processor puts before, between and behind them.

        Raises:
            VjaxValidationError: As `encode`.
        """
        for part in (text, pair):
            self.encode(part, add_special_tokens=False)
        return self.backend.encode(text, pair, add_special_tokens=add_special_tokens).ids

    def _encode_end(self, text: str, add_special_tokens: bool, max_length: int) -> list[int]:
        encoding = self.backend.encode(text, add_special_tokens=False)
        num_added = self.backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        if len(encoding.ids) + num_added <= max_length:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        if num_added >= max_length:
            return encoding.ids[-max_length:]
        encoding.truncate(max_length - num_added, direction="left")
        return self.backend.post_process(encoding, None, add_special_tokens).ids if num_added else encoding.ids

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens))

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids without a token are dropped. (Hugging Face's default keeps special tokens.)"""
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary spells them; "" for an id without a token."""
        return [self.backend.id_to_token(int(i)) or "" for i in token_ids]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of one token, None if there is none."""
        return self.backend.token_to_id(token)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str | list[int]:
        """Renders a conversation with the model's template (or another: its Jinja text, or the name of one of the
        model's); `tokenize` also encodes it, to a list of ids.

        Raises:
            VjaxValidationError: There is no template, or it refuses the messages.
        """
        template = self.get_chat_template(chat_template, has_tools=bool(tools))
        text = render(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            **(self.special_tokens_map | template_kwargs),
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def get_chat_template(self, chat_template: str | None = None, has_tools: bool = False) -> str:
        """The Jinja text that `apply_chat_template` uses.

        Raises:
            VjaxValidationError: There is none.
        """
        if chat_template is not None:
            return self.chat_templates.get(chat_template, chat_template)
        if has_tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if "default" in self.chat_templates:
            return self.chat_templates["default"]
        names = ", ".join(sorted(self.chat_templates))
        why = f"has no default chat template, only {names}; name one" if names else "has no chat template; pass one"
        raise VjaxValidationError(
            f"the tokenizer {self.name_or_path!r} {why} as chat_template=... (in the shell --chat-template FILE), "
            "or use generate with a prompt that you format yourself.",
            parameter="chat_template",
        )

    def decode_stream(
        self,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> DecodeStream:
        """A decoder that takes a continuation of the prompt token by token."""
        del spaces_between_special_tokens  # tokenizer.json decoders put no space there
        return self._streams.new(prompt_token_ids, skip_special_tokens)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def unk_token(self) -> str | None:
        return self.special_tokens_map.get("unk_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens_map.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._id_of("unk_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of("pad_token")

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self.convert_tokens_to_ids(token)
