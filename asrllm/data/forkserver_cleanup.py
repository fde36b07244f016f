"""Remove the directory of a fork server's socket when the server ends.

A fork server preloads this module, and nothing else imports it. The process that started the server
removes the directory when it ends, unless it is killed. The server notices that and ends too.
"""

import atexit
import os
import shutil

from asrllm.data.parallel import SOCKET_DIR

if SOCKET_DIR in os.environ:
    atexit.register(shutil.rmtree, os.environ[SOCKET_DIR], ignore_errors=True)
