"""How other programs than Claude Code speak with their models, for tests/kit/scripted_model.py.

DIALECTS has, by the end of the path: a function that makes a request of the Messages API (its messages and tools) of
theirs, and one that makes the server-sent events of an answer of its content blocks.
"""

import json

from tests.kit import scripted_model as kit


def tools_of(request):
    """The names of the tools that a model may call."""
    return [tool["name"] for tool in request["tools"]]


def of_anything(content):
    """Blocks of text, of the many ways to write one."""
    if isinstance(content, list):
        return [block for part in content for block in of_anything(part)]
    if isinstance(content, dict):
        return of_anything(content["text"]) if "text" in content else [kit.words(json.dumps(content))]
    return [kit.words(content)] if content else []


def lines(*data):
    return "".join(f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n" for one in data)


def of_chat(body):
    """Chat completions: Qwen, Copilot, OpenCode."""
    messages = [
        {"role": "assistant" if said["role"] == "assistant" else "user", "content": of_anything(said.get("content"))}
        for said in body["messages"]
    ]
    return {**body, "messages": messages, "tools": [tool.get("function", tool) for tool in body.get("tools") or []]}


def as_chat(model, content):
    def chunk(delta, reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return {"id": "chat-1", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice],
                "usage": usage}  # fmt: skip

    deltas, calls = [], 0
    for block in content:
        if block["type"] == "tool_use":
            function = {"name": block["name"], "arguments": json.dumps(block["input"])}
            call = {"index": calls, "id": block["id"], "type": "function", "function": function}
            deltas.append({"role": "assistant", "tool_calls": [call]})
            calls += 1
        else:
            deltas.append({"role": "assistant", "content": block["text"]})
    return lines(*map(chunk, deltas), chunk({}, "tool_calls" if calls else "stop"), "[DONE]")


def of_responses(body):
    """The Responses API: Codex."""
    messages = []
    for item in body["input"] if isinstance(body["input"], list) else [{"role": "user", "content": body["input"]}]:
        kind = item.get("type", "message")
        role = "assistant" if item.get("role") == "assistant" or kind in ("function_call", "reasoning") else "user"
        messages.append({"role": role, "content": of_anything(item.get("content") or item.get("output"))})
    tools = [inner for tool in body.get("tools") or [] for inner in named(tool)]
    return {**body, "messages": messages, "tools": tools}


def named(tool):
    """A tool, or SPACE/TOOL for those of a name space, which an answer has to name apart."""
    inside = tool.get("tools")
    if inside:
        return [{**one, "name": f"{tool['name']}/{one['name']}"} for one in inside]
    return [{"name": tool["type"], **tool}]


def as_responses(model, content):
    events = [{"type": "response.created", "response": {"id": "resp_1"}}]
    for block in content:
        if block["type"] == "tool_use":
            space, _, name = block["name"].rpartition("/")
            item = {"type": "function_call", "call_id": block["id"], "arguments": json.dumps(block["input"])}
            item.update({"name": name, **({"namespace": space} if space else {})})
        else:
            text = {"type": "output_text", "text": block["text"], "annotations": []}
            item = {"type": "message", "id": "msg_1", "role": "assistant", "content": [text]}
        events.append({"type": "response.output_item.done", "output_index": len(events) - 1, "item": item})
    usage = {"input_tokens": 1, "input_tokens_details": None, "output_tokens": 1, "output_tokens_details": None}
    events.append({"type": "response.completed", "response": {"id": "resp_1", "usage": {**usage, "total_tokens": 2}}})
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)


def of_gemini(body):
    messages = [
        {
            "role": "assistant" if said.get("role") == "model" else "user",
            "content": [block for part in said["parts"] for block in of_anything(part)],
        }
        for said in body["contents"]
    ]
    tools = [one for tool in body.get("tools") or [] for one in tool.get("functionDeclarations", [])]
    return {**body, "messages": messages, "tools": tools}


def as_gemini(model, content):
    parts = [
        {"functionCall": {"id": block["id"], "name": block["name"], "args": block["input"]}}
        if block["type"] == "tool_use"
        else {"text": block["text"]}
        for block in content
    ]
    candidate = {"content": {"role": "model", "parts": parts}, "finishReason": "STOP", "index": 0}
    usage = {"promptTokenCount": 1, "candidatesTokenCount": 1, "totalTokenCount": 2}
    return lines({"candidates": [candidate], "usageMetadata": usage, "modelVersion": model or "m"})


DIALECTS = {
    "/chat/completions": (of_chat, as_chat),
    "/responses": (of_responses, as_responses),
    ":streamGenerateContent": (of_gemini, as_gemini),
}
