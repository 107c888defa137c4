"""The implementation of `serving up`: starting Ray, the run file, the supervisor, the Serve applications."""
