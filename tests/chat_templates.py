"""Chat templates that test_chat.py and test_prepare_chat.py render with acorn and with transformers.

TEMPLATES: short templates in published formats, name -> control tokens and template.
PUBLISHED: templates of published models in the package trl, file name -> control tokens.
The first two control tokens of each list are BOS and EOS.
"""

S = ["<s>", "</s>"]
IM = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def system_in_first_turn(open_turn: str, close_turn: str, reply: str) -> str:
    """Return a template that writes the system message into the first user turn."""
    return (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content %}"
        "{% elif m.role == 'user' %}" + open_turn + "{{ m.content }}" + close_turn + "{% set ns.system = '' %}"
        "{% else %}" + reply + "{% endif %}{% endfor %}"
    )


QWEN_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{{- '# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}"
    "{{- '\n</tools><|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}"
)
QWEN_CALLS = (
    '{%- for call in m.tool_calls or [] %}{{- \'\n<tool_call>\n{"name": "\' + call.function.name + \'", '
    "\"arguments\": ' + call.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}"
)
QWEN_TOOL_RESULT = (
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
)

TEMPLATES = {
    "chatml": (IM, CHATML),
    "smollm2": (
        IM,
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful AI "
        "assistant named SmolLM<|im_end|>\n{% endif %}" + CHATML.removeprefix("{% for m in messages %}"),
    ),
    "qwen2": (
        IM,
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful "
        "assistant.<|im_end|>\n{% endif %}" + CHATML.removeprefix("{% for m in messages %}"),
    ),
    "zephyr": (
        S,
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    ),
    "tinyllama": (
        S,
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}\n{% endfor %}",
    ),
    "llama-2": (
        S,
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' "
        "[/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    ),
    "mistral": (
        S,
        system_in_first_turn(
            "{{ '[INST] ' + (ns.system + '\n\n' if ns.system else '') }}",
            "[/INST]",
            "{{ ' ' + m.content + eos_token }}",
        ),
    ),
    "mistral-tools": (
        [*S, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"],
        "{{ bos_token }}{% set ns = namespace(last=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
        "{% elif m.role == 'user' %}{% if tools and loop.index0 == ns.last %}"
        "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
        "{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% elif m.tool_calls %}{{ '[TOOL_CALLS] ' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
        "{{ eos_token }}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    ),
    "llama-3": (
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        "{% for m in messages %}{{ bos_token if loop.first else '' }}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "llama-3.1": (
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"],
        "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
        "{%- if tools %}{{- 'Environment: ipython\n' }}{%- for t in tools %}{{- t | tojson(indent=4) + '\n\n' }}"
        "{%- endfor %}{%- endif %}{{- system + '<|eot_id|>' }}"
        "{%- for m in messages %}"
        "{%- if 'tool_calls' in m %}{%- set call = m.tool_calls[0].function %}"
        '{{- \'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + call.name + \'", "parameters": \' }}'
        "{{- call.arguments | tojson }}{{- '}<|eom_id|>' }}"
        "{%- elif m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
        "{{- m.content | tojson if m.content is mapping else m.content }}{{- '<|eot_id|>' }}"
        "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
        "{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    ),
    "vicuna": (
        S,
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    ),
    "alpaca": (
        S,
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
        "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    ),
    "solar": (
        S,
        "{% for m in messages %}{% if m.role == 'system' %}{{ '### System:\n' + m.content + '\n\n' }}"
        "{% elif m.role == 'user' %}{{ '### User:\n' + m.content + '\n\n' }}"
        "{% else %}{{ '### Assistant:\n' + m.content + eos_token + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}",
    ),
    "gemma": (
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
        "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + "
        "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    "phi-3": (
        ["<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ),
    "qwen2.5": (
        IM,
        QWEN_TOOLS + "{%- for m in messages %}"
        "{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
        "{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\n' + m.content }}" + QWEN_CALLS + ""
        "{{- '<|im_end|>\n' }}" + QWEN_TOOL_RESULT + "{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
    ),
    "qwen3": (
        IM,
        QWEN_TOOLS + "{%- set ns = namespace(last=0) %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}"
        "{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
        "{%- elif m.role == 'assistant' %}"
        "{%- set thought = m.reasoning_content or '' %}{%- set content = m.content or '' %}"
        "{%- if '</think>' in content %}"
        "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{{- '<|im_start|>assistant\n' }}"
        "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
        "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- content }}" + QWEN_CALLS + ""
        "{{- '<|im_end|>\n' }}" + QWEN_TOOL_RESULT + "{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}",
    ),
    "openchat": (
        ["<s>", "<|end_of_turn|>"],
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '<|end_of_turn|>' }}"
        "{% else %}{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content + '<|end_of_turn|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}",
    ),
    "falcon3": (
        ["<|startoftext|>", "<|endoftext|>"],
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}"
        "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
    "command-r": (
        [
            "<BOS_TOKEN>",
            "<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ],
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}{{ '<|USER_TOKEN|>' if m.role == 'user' "
        "else '<|SYSTEM_TOKEN|>' if m.role == 'system' else '<|CHATBOT_TOKEN|>' }}{{ m.content.strip() }}"
        "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
    ),
    "granite": (
        ["<|end_of_text|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"],
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' }}"
        "{{ m.content + '<|end_of_text|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
    ),
    "phi-4": (
        ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|im_sep|>"],
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    ),
}

# the next two are unsuitable for training, but work for sampling
DEEPSEEK_R1 = (
    ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}",
)
FALCON_180B = (
    ["<|startoftext|>", "<|endoftext|>"],
    "{% for m in messages %}{{ '' if loop.first else '\n' }}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Falcon'}[m.role] + ': ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nFalcon:' }}{% endif %}",
)

TURN = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"]
GEMMA_3 = ["<bos>", "<end_of_turn>", "<start_of_turn>"]
GEMMA_4 = ["<bos>", "<turn|>", *TURN]
LFM = ["<|startoftext|>", "<|im_end|>", "<|im_start|>", "<|tool_call_start|>", "<|tool_call_end|>"]
LLAMA_3 = TEMPLATES["llama-3.1"][0]
PHI_3 = TEMPLATES["phi-3"][0]
PUBLISHED = {
    "cohere": TEMPLATES["command-r"][0],
    "cohere2": [*TEMPLATES["command-r"][0], "<|START_RESPONSE|>", "<|END_RESPONSE|>"],
    "diffusion_gemma": GEMMA_4,
    "gemma": GEMMA_3,
    "gemma3": GEMMA_3,
    "gemma4": GEMMA_4,
    "gemma4_v5": GEMMA_4,
    "gptoss": ["<|startoftext|>", "<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"],
    "lfm2": LFM,
    "lfm2_v2": LFM,
    "lfm2_2_5": LFM,
    "llama3": LLAMA_3,
    "llama3_1": LLAMA_3,
    "llama3_2": LLAMA_3,
    "muse_glimmer": ["<|begin_of_text|>", "<|eot|>", "<|eom|>", "<|start|>", "<|message|>"],
    "nemotron_3_nano": ["<s>", "<|im_end|>", "<|im_start|>"],
    "nemotron_3_ultra": ["<s>", "<|im_end|>", "<|im_start|>"],
    "phi3": PHI_3,
    "phi3_5": PHI_3,
    "qwen2_5": IM,
    "qwen2_5_vl": IM,
    "qwen3": IM,
    "qwen3_instruct_2507": IM,
    "qwen3_vl": IM,
    "qwen3_5_think": IM,
    "qwen3_5_nothink": IM,
    "qwen3_8": IM,
}
# they open a reply with <think>, so replies without reasoning cannot be learned
NEED_THOUGHTS = {"nemotron_3_nano", "nemotron_3_ultra"}
CHAT_ONLY = {  # unsuitable for training, but work for sampling: name -> control tokens and reason
    "deepseek_r1_distill": (DEEPSEEK_R1[0], "<think>"),
    "deepseekv3": (DEEPSEEK_R1[0], "<think>"),
    "glm4moe": (["<|endoftext|>", "<|endoftext|>", "<|user|>", "<|assistant|>"], "ends a reply"),
}
