"""The chat template and the end tokens in a model's small files, read before any weight. No code of a folder is run but
its chat template, in transformers' sandbox.
"""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, PROCESSOR_NAME

from saga_fast.utils.releases import Release


def chat_template(release: Release, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The processor's chat template, which supports images, else the tokenizer's; of named templates `default`."""
    file = PROCESSOR_NAME
    template = (release.read_json(file) or {}).get("chat_template")
    if template is None and (legacy := release.read_json(LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)) is not None:
        file = LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE
        if (template := legacy.get("chat_template")) is None:
            raise release.malformed(file, "it holds no chat_template")
    if template is None:
        file, template = "chat template", tokenizer.chat_template
    if isinstance(template, list) and all(
        isinstance(one, dict) and {"name", "template"} <= one.keys() for one in template
    ):
        template = {str(one["name"]): one["template"] for one in template}
    if isinstance(template, dict):
        if "default" not in template:
            raise release.error(
                f"has chat templates named {', '.join(sorted(map(str, template)))} and none named default: "
                "rename the one for images, or put it into chat_template.jinja"
            )
        template = template["default"]
    if not isinstance(template, str | None):
        raise release.malformed(file, f"chat_template is a {type(template).__name__}, not text")
    return template


def end_tokens(release: Release, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The EOS token ids in the model's files: of generation_config.json, else config.json, and of the tokenizer.

    The caller adds the chat template's own end of a turn.
    """
    vocabulary, found = config.text_config.vocab_size, []
    file = GENERATION_CONFIG_NAME
    eos = (release.read_json(file) or {}).get("eos_token_id")
    if eos is None:  # of the file itself, not the default of its class, which is another model's
        file, raw = "config.json", release.read_json("config.json") or {}
        eos = raw.get("eos_token_id")
        eos = (raw.get("text_config") or {}).get("eos_token_id") if eos is None else eos
    for token in eos if isinstance(eos, list) else [eos] * (eos is not None):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            accepted = f"token ids from 0 to {vocabulary - 1}"
            raise release.malformed(file, f"eos_token_id is {eos!r}; accepted are {accepted}")
        found.append(token)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id < vocabulary:
        found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(found))
