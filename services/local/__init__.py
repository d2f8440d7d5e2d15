"""The local mesh: starts, watches and ends the processes of a pipeline on this machine."""
