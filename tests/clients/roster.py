"""The clients that are run, each at the version that is spoken of."""

from clients.trial import Client

PYTHON = Client("PyPI `wavespeed`", "2.0.5", "pypi-wavespeed-2.0.5", driver="wavespeed_python.py")
PYTHON_1 = Client("PyPI `wavespeed`", "1.0.8", "pypi-wavespeed-1.0.8", driver="wavespeed_python.py")
PYTHON_0 = Client(
    "PyPI `wavespeed`",
    "0.0.5",
    "pypi-wavespeed-0.0.5",
    driver="wavespeed_python_0.py",
    mute={"bad key": "401 Unauthorized", "bad parameter": "400 Bad Request"},
)
JAVASCRIPT = Client("npm `wavespeed`", "0.3.2", "npm-wavespeed-0.3.2", driver="wavespeed_js.cjs")
JAVASCRIPT_0_2 = Client(
    "npm `wavespeed`", "0.2.3", "npm-wavespeed-0.2.3", driver="wavespeed_js.cjs"
)
LANGCHAIN = Client(
    "PyPI `langchain-wavespeed`", "0.1.3", "pypi-langchain-wavespeed", driver="langchain_tools.py"
)
LLAMA_INDEX = Client(
    "PyPI `llama-index-tools-wavespeed`",
    "0.1.3",
    "pypi-llama-index-tools-wavespeed",
    driver="llama_index_tools.py",
)
LANGFLOW = Client(
    "PyPI `lfx-wavespeed`", "0.1.3", "pypi-lfx-wavespeed", driver="langflow_components.py"
)
HUB = Client("PyPI `huggingface_hub`", "2.4.0", "pypi-huggingface-hub", driver="hub_inference.py")
MCP_NODE = Client("npm `@wavespeed/mcp`", "1.0.7", "npm-wavespeed-mcp")
MCP_PYTHON = Client("PyPI `wavespeed-mcp`", "0.1.27", "pypi-wavespeed-mcp")
MCP_SERVER = Client(
    "PyPI `mcp-server-wavespeed`, whose two models are not here",
    "0.1.0",
    "pypi-mcp-server-wavespeed",
    has_fixed_host=True,
)
CLI = Client("npm `@wavespeed/cli`", "0.2.2", "npm-wavespeed-cli")
SKILLS = Client("PyPI `wavespeedai-skills`", "1.2.0", "pypi-wavespeedai-skills")
CURL = Client("curl, as in the hosted documentation", "any", "curl")
N8N = Client("n8n node (its requests, replayed)", "not run", "n8n")
COMFYUI = Client(
    "ComfyUI nodes (their client class)",
    "6b1425b",
    "for-checkouts",
    driver="comfyui_nodes.py",
    mute={"bad key": "Unauthorized: Invalid API key"},
    checkout="wavespeed-comfyui",
)
COMFYUI_CATALOGUE = Client(
    "ComfyUI nodes (their catalogue)",
    "6b1425b",
    "for-checkouts",
    driver="comfyui_catalogue.py",
    checkout="wavespeed-comfyui",
    has_fixed_host=True,
)
DIFY = Client(
    "Dify plugin (its client class)",
    "0.0.2",
    "for-checkouts",
    driver="dify_client.py",
    checkout="dify-wavespeed-plugin",
    has_fixed_host=True,
)
DIFY_TOOL = Client(
    "Dify plugin (its image tool, which sends no picture)",
    "0.0.2",
    "dify-plugin-sdk",
    driver="dify_tool.py",
    checkout="dify-wavespeed-plugin",
    has_fixed_host=True,
)
N8N_NODE = Client(
    "n8n node (its `execute()`)",
    "0.1.3",
    "for-checkouts-node",
    driver="n8n_node.cjs",
    checkout="n8n-nodes-wavespeed",
    has_fixed_host=True,
)
DESKTOP = Client(
    "Desktop app (its API client)",
    "2.1.7",
    "for-checkouts-node",
    driver="desktop_app.cjs",
    checkout="wavespeed-desktop",
    has_fixed_host=True,
)
DISCORD = Client(
    "Discord bot (its gateway)",
    "0.1.0",
    "for-checkouts-node",
    driver="discord_bot.cjs",
    checkout="wavespeed-discord-bot",
)
AI_SDK = Client(
    "AI SDK provider (its image model)",
    "0.1.3",
    "for-checkouts-node",
    driver="ai_sdk.cjs",
    checkout="ai-sdk-provider",
)
LITELLM = Client(
    "LiteLLM's provider (of a branch), in PyPI `litellm`",
    "1.110.2",
    "pypi-litellm-1.110.2",
    driver="litellm_provider.py",
    checkout="litellm",
)
GO = Client("Go SDK", "268f200", "", driver="wavespeed_go.go", checkout="wavespeed-go")
JAVA = Client("Java SDK", "0.2.4", "", driver="WavespeedJava.java", checkout="wavespeed-java")
PHP = Client(
    "PHP: wavespeed-ai-bundle",
    "ffe7c29",
    "",
    driver="php_bundle.php",
    mute={"bad key": "rejected the configured API credentials"},
    checkout="wavespeed-ai-bundle",
)
# Only for their own tests: registries have them, newer or the same.
PYTHON_CHECKOUT = Client(
    "Python SDK, from its repository",
    "a420718",
    "pypi-wavespeed-2.0.5",
    checkout="wavespeed-python",
)
JAVASCRIPT_CHECKOUT = Client(
    "JavaScript SDK, from its repository", "0.2.0", "", checkout="wavespeed-javascript"
)
LLAMA_INDEX_CHECKOUT = Client(
    "LlamaIndex tool, from its repository",
    "45d685c",
    "pypi-llama-index-tools-wavespeed",
    checkout="llama-index-tools-wavespeed",
)
