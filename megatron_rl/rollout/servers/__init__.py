"""Generation by inference servers: what talks to SGLang and vLLM, and how the weights reach them."""
