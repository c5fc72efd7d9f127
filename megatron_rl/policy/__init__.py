"""The Megatron-Core policy. Importing this package prepares Megatron for the device, so import it before
megatron.core."""

from megatron_rl import device

device.prepare_megatron()
