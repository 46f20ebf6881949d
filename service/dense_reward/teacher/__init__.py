"""The service as a teacher for distillation: the requests and answers of vLLM's and SGLang's routes for log-probs."""
