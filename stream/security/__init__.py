"""What keeps secrets, connections and files safe: logins and TLS, modes of files, reading within bounds."""
