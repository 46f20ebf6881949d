"""Models computed elsewhere: by servers of vLLM or SGLang, or by vLLM in this process."""
