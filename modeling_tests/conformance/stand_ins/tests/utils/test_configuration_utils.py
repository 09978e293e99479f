"""Not in the source distribution: arguments that every config takes, each at a value that is not its default."""

config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["JamModel"],
    "id2label": {0: "text", 1: "image"},
    "label2id": {"text": 0, "image": 1},
    "problem_type": "regression",
}
