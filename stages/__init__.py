import lora_dag  # noqa: F401  (its checks of the machine come first)
