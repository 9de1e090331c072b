BEGIN TRANSACTION;
CREATE TABLE bus(id TEXT NOT NULL, last INTEGER NOT NULL);
INSERT INTO "bus" VALUES('a1039a721bc91021',1735689600699025);
CREATE TABLE mailboxes(
        id INTEGER PRIMARY KEY, channel TEXT NOT NULL, name TEXT NOT NULL,
        own INTEGER NOT NULL DEFAULT 0,      -- somebody reads it as their own, first name
        read INTEGER,                        -- highest cursor its owner presented; NULL before the first
        fetched INTEGER NOT NULL DEFAULT 0,  -- highest tick in an answer that was written out
        seen INTEGER NOT NULL DEFAULT 0,     -- wall clock of the last poll, us
        removed INTEGER NOT NULL DEFAULT 0,  -- highest tick that retention removed
        UNIQUE(channel, name));
INSERT INTO "mailboxes" VALUES(1,'default','pruned',1,1735689600696295,1735689600699025,1735689600700878,1735689600699025);
INSERT INTO "mailboxes" VALUES(2,'default','all',0,NULL,1735689602482937,1735689602486215,0);
INSERT INTO "mailboxes" VALUES(3,'default','never-read',0,NULL,0,0,0);
INSERT INTO "mailboxes" VALUES(4,'default','fetched-only',1,0,1735689602474102,1735689602480300,0);
INSERT INTO "mailboxes" VALUES(5,'default','half-way',1,1735689602475483,1735689602478971,1735689602482129,0);
INSERT INTO "mailboxes" VALUES(6,'default','dell',1,1735689602482936,1735689602482937,1735689602486215,0);
INSERT INTO "mailboxes" VALUES(7,'default','team',0,NULL,1735689602482937,1735689602486215,0);
INSERT INTO "mailboxes" VALUES(8,'lab','all',0,NULL,1735689602489519,1735689602491342,0);
INSERT INTO "mailboxes" VALUES(9,'lab','nano',1,1735689602488324,1735689602489519,1735689602491342,0);
INSERT INTO "mailboxes" VALUES(10,'default','array',0,NULL,0,0,0);
INSERT INTO "mailboxes" VALUES(11,'default','texts',0,NULL,0,0,0);
INSERT INTO "mailboxes" VALUES(12,'default','keys',0,NULL,0,0,0);
INSERT INTO "mailboxes" VALUES(13,'default','keys-too',0,NULL,0,0,0);
INSERT INTO "mailboxes" VALUES(14,'lab','keys',0,NULL,0,0,0);
INSERT INTO "mailboxes" VALUES(15,'default','short',0,NULL,0,0,0);
INSERT INTO "mailboxes" VALUES(16,'default','spark',0,NULL,0,0,0);
INSERT INTO "mailboxes" VALUES(17,'default','recalled',0,NULL,0,0,0);
INSERT INTO "mailboxes" VALUES(18,'default','queue',0,NULL,0,0,0);
INSERT INTO "mailboxes" VALUES(19,'default','failing',0,NULL,0,0,0);
INSERT INTO "mailboxes" VALUES(20,'default','last-try',0,NULL,0,0,0);
CREATE TABLE messages(
        tick INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, n INTEGER NOT NULL, sender TEXT NOT NULL,
        key TEXT, expires INTEGER, depth INTEGER NOT NULL, sum INTEGER NOT NULL, text TEXT NOT NULL);
INSERT INTO "messages" VALUES(1735689602464823,1,1,'spark',NULL,NULL,0,1528989997,'"from": "spark", "channel": "default", "msg": "new 0"');
INSERT INTO "messages" VALUES(1735689602466994,1,2,'spark',NULL,NULL,0,2216132982,'"from": "spark", "channel": "default", "msg": "new 1"');
INSERT INTO "messages" VALUES(1735689602468310,3,1,'spark',NULL,NULL,0,2690156869,'"from": "spark", "channel": "default", "msg": "message 0"');
INSERT INTO "messages" VALUES(1735689602469809,4,1,'spark',NULL,NULL,0,4117465099,'"from": "spark", "channel": "default", "msg": "message 0"');
INSERT INTO "messages" VALUES(1735689602471593,5,1,'dell',NULL,NULL,0,1909127926,'"from": "dell", "channel": "default", "msg": "message 0", "subject": "S0"');
INSERT INTO "messages" VALUES(1735689602472956,3,2,'spark',NULL,NULL,0,3981773735,'"from": "spark", "channel": "default", "msg": "message 1"');
INSERT INTO "messages" VALUES(1735689602474102,4,2,'spark',NULL,NULL,0,954540257,'"from": "spark", "channel": "default", "msg": "message 1"');
INSERT INTO "messages" VALUES(1735689602475483,5,2,'dell',NULL,NULL,0,3128002891,'"from": "dell", "channel": "default", "msg": "message 1", "subject": "S1"');
INSERT INTO "messages" VALUES(1735689602476764,3,3,'spark',NULL,NULL,0,1363121986,'"from": "spark", "channel": "default", "msg": "message 2"');
INSERT INTO "messages" VALUES(1735689602477875,4,3,'spark',NULL,NULL,0,1585306745,'"from": "spark", "channel": "default", "msg": "message 2"');
INSERT INTO "messages" VALUES(1735689602478971,5,3,'dell',NULL,NULL,0,321361668,'"from": "dell", "channel": "default", "msg": "message 2", "subject": "S2"');
INSERT INTO "messages" VALUES(1735689602482936,6,1,'spark',NULL,NULL,0,2226267366,'"from": "spark", "channel": "default", "msg": "to two", "priority": "high"');
INSERT INTO "messages" VALUES(1735689602482937,7,1,'spark',NULL,NULL,0,2129259411,'"from": "spark", "channel": "default", "msg": "to two", "priority": "high"');
INSERT INTO "messages" VALUES(1735689602487006,7,2,'spark',NULL,NULL,0,4072857358,'"from": "spark", "channel": "default", "msg": "for the group"');
INSERT INTO "messages" VALUES(1735689602488324,8,1,'dell',NULL,NULL,0,2787885885,'"from": "dell", "channel": "lab", "msg": "hear me"');
INSERT INTO "messages" VALUES(1735689602489519,9,1,'dell',NULL,NULL,0,1961877530,'"from": "dell", "channel": "lab", "msg": "on another channel"');
INSERT INTO "messages" VALUES(1735689602492079,10,1,'dell',NULL,NULL,0,3343799134,'"from": "dell", "channel": "default", "msg": "0"');
INSERT INTO "messages" VALUES(1735689602492080,10,2,'dell',NULL,NULL,0,1092851361,'"from": "dell", "channel": "default", "msg": "1"');
INSERT INTO "messages" VALUES(1735689602492081,10,3,'dell',NULL,NULL,0,909913615,'"from": "dell", "channel": "default", "msg": "2"');
INSERT INTO "messages" VALUES(1735689602493691,11,1,'spark',NULL,NULL,0,2562305574,'"from": "spark", "channel": "default", "msg": "line one\n\ttab \"quotes\" \\ '' / \u00e9 \u4e2d \ud83d\udc1d \u2028 -- ; );\n", "x-new": [1, {"a": null, "b": [true, 1.5, -7, "\u00e9"]}], "Msg": "", "type": "result", "content_type": "text/markdown"');
INSERT INTO "messages" VALUES(1735689602495121,12,1,'spark','k-1',NULL,0,3361294056,'"from": "spark", "channel": "default", "msg": "once"');
INSERT INTO "messages" VALUES(1735689602496600,12,2,'spark','k-2',NULL,0,1024722392,'"from": "spark", "channel": "default", "msg": "to both"');
INSERT INTO "messages" VALUES(1735689602496601,13,1,'spark','k-2',NULL,0,1622123060,'"from": "spark", "channel": "default", "msg": "to both"');
INSERT INTO "messages" VALUES(1735689602497939,14,1,'dell','k-1',NULL,0,3223843660,'"from": "dell", "channel": "lab", "msg": "elsewhere", "subject": "S"');
INSERT INTO "messages" VALUES(1735689602499165,15,1,'spark',NULL,1735689602500165,0,651491165,'"from": "spark", "channel": "default", "msg": "gone", "ttl": 0.001');
INSERT INTO "messages" VALUES(1735689602500602,15,2,'spark',NULL,2735689602500602,0,2953890766,'"from": "spark", "channel": "default", "msg": "lasting", "ttl": 1000000000.0');
INSERT INTO "messages" VALUES(1735689602501770,6,2,'spark',NULL,NULL,0,817997105,'"from": "spark", "channel": "default", "msg": "a question"');
INSERT INTO "messages" VALUES(1735689602503118,16,1,'dell',NULL,NULL,1,1658854088,'"from": "dell", "channel": "default", "msg": "an answer", "reply_to": "62a99ba328c8a"');
INSERT INTO "messages" VALUES(1735689602504452,6,3,'spark','thanks',NULL,2,2118646918,'"from": "spark", "channel": "default", "msg": "thank you", "reply_to": "62a99ba3291ce"');
INSERT INTO "messages" VALUES(1735689602505678,16,2,'dell',NULL,NULL,1,2822949987,'"from": "dell", "channel": "default", "msg": "another answer", "reply_to": "62a99ba328c8a"');
INSERT INTO "messages" VALUES(1735689602506840,17,1,'spark','k-3',NULL,0,1537282337,'"from": "spark", "channel": "default", "msg": "never mind"');
INSERT INTO "messages" VALUES(1735689602508056,17,2,'spark',NULL,NULL,0,2729198509,'"from": "spark", "channel": "default", "msg": "this one stays"');
INSERT INTO "messages" VALUES(1735689602509787,18,1,'spark',NULL,NULL,0,3780648322,'"from": "spark", "channel": "default", "msg": "done", "subject": "job done"');
INSERT INTO "messages" VALUES(1735689602511067,18,2,'spark',NULL,NULL,0,551474603,'"from": "spark", "channel": "default", "msg": "given back", "subject": "job given back"');
INSERT INTO "messages" VALUES(1735689602512161,18,3,'spark',NULL,NULL,0,863473249,'"from": "spark", "channel": "default", "msg": "later", "subject": "job later"');
INSERT INTO "messages" VALUES(1735689602513267,18,4,'spark',NULL,NULL,0,3331020708,'"from": "spark", "channel": "default", "msg": "out", "subject": "job out"');
INSERT INTO "messages" VALUES(1735689602514264,18,5,'spark',NULL,NULL,0,3377767789,'"from": "spark", "channel": "default", "msg": "extended", "subject": "job extended"');
INSERT INTO "messages" VALUES(1735689602515280,18,6,'spark',NULL,NULL,0,4272733259,'"from": "spark", "channel": "default", "msg": "waits", "subject": "job waits"');
INSERT INTO "messages" VALUES(1735689602518692,19,1,'spark',NULL,NULL,0,1569877469,'"from": "spark", "channel": "default", "msg": "failing, five times", "subject": "S"');
INSERT INTO "messages" VALUES(1735689602522394,20,1,'spark',NULL,NULL,0,2059981545,'"from": "spark", "channel": "default", "msg": "last-try, five times", "subject": "S"');
CREATE TABLE uses(token TEXT PRIMARY KEY, used INTEGER NOT NULL);
CREATE INDEX in_order ON messages(mailbox, tick);
CREATE INDEX retries ON messages(key, sender) WHERE key IS NOT NULL;
CREATE INDEX expiring ON messages(mailbox, expires, tick) WHERE expires IS NOT NULL;
CREATE VIEW readable AS SELECT datetime(tick / 1000000, 'unixepoch') AS time, channel, sender, name AS "to",
        json_extract('{' || text || '}', '$.msg') AS msg FROM messages JOIN mailboxes ON mailbox = id;
COMMIT;
PRAGMA user_version=1;
