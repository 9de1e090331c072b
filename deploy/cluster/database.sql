-- The first leader runs this once: the user and the database of the bus (node.sh fills in the password).
SET synchronous_commit = local;  -- there is no second node yet
CREATE ROLE bus LOGIN PASSWORD '@BUS@';
CREATE DATABASE bus OWNER bus;
