"""Everything that touches LLaVA. `register()` makes an installed or checked-out LLaVA know the plugin."""

from .host import HostError, import_llava
from .registration import register, registered, unregister

__all__ = ["HostError", "import_llava", "register", "registered", "unregister"]
