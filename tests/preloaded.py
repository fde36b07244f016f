"""The last module that the server of `tests.processes` imports. It prepares the memory to fork.

Every run parses Hydra's configuration and compiles the patterns of transformers' weight names. The
parser's tables and the patterns are cached, therefore the forked processes inherit them.
"""

import gc

from hydra import compose, initialize_config_module
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

for name in ("train", "evaluate"):
    with initialize_config_module("asrllm.conf", version_base="1.3"):
        compose(name, overrides=["exp_dir=/a/b-1.c"])
get_checkpoint_conversion_mapping("qwen2")
# otherwise each collection in a forked process copies the pages of 560,000 imported objects
gc.collect()
gc.freeze()
