"""Our own chat template, for base models whose tokenizer brings none.

Roles are plain words on a line of their own, so that no token has to be added to the vocabulary.
Every assistant turn ends with EOS and nothing comes after the last one: EOS is what the model
learns to stop with.
"""

from typing import TYPE_CHECKING

from fastdpo.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_CHAT_TEMPLATE = """\
{%- if bos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
    {%- if not loop.first %}{{ '\\n\\n' }}{% endif %}
    {{- message['role'] | capitalize + ':\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] or [] %}{{- part['text'] }}{% endfor %}
    {%- endif %}
    {%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\nAssistant:\\n' }}{% endif %}"""


def ensure_chat_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Give `tokenizer` the plain template when it has none.

    Args:
        tokenizer: its `chat_template` is set in place, so that it is saved with the adapter.

    Returns:
        Whether the template was set by this call.

    Raises:
        DataError: the tokenizer has no EOS token, so no turn could be ended.
    """
    if tokenizer.chat_template is not None:
        return False
    if tokenizer.eos_token is None:
        raise DataError(
            "the data is conversational, but the tokenizer has neither a chat template nor an EOS "
            "token; set tokenizer.eos_token to the token that ends a text, or set "
            "tokenizer.chat_template"
        )
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return True
