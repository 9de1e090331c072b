BEGIN TRANSACTION;
CREATE TABLE bus(id TEXT NOT NULL, last INTEGER NOT NULL);
INSERT INTO "bus" VALUES('84211cf0334fa87b',1735689600984899);
CREATE TABLE mailboxes(
        id INTEGER PRIMARY KEY, channel TEXT NOT NULL, name TEXT NOT NULL,
        own INTEGER NOT NULL DEFAULT 0,      -- somebody reads it as their own, first name
        read INTEGER,                        -- highest cursor its owner presented; NULL before the first
        fetched INTEGER NOT NULL DEFAULT 0,  -- highest tick in an answer that was written out
        seen INTEGER NOT NULL DEFAULT 0,     -- wall clock of the last poll, us
        removed INTEGER NOT NULL DEFAULT 0, taken INTEGER NOT NULL DEFAULT 0,  -- highest tick that retention removed
        UNIQUE(channel, name));
INSERT INTO "mailboxes" VALUES(1,'default','pruned',1,1735689600982871,1735689600984899,1735689600986821,1735689600984899,0);
INSERT INTO "mailboxes" VALUES(2,'default','all',0,NULL,1735689602615040,1735689602617128,0,0);
INSERT INTO "mailboxes" VALUES(3,'default','never-read',0,NULL,0,0,0,0);
INSERT INTO "mailboxes" VALUES(4,'default','fetched-only',1,0,1735689602608160,1735689602612681,0,0);
INSERT INTO "mailboxes" VALUES(5,'default','half-way',1,1735689602609123,1735689602611660,1735689602614320,0,0);
INSERT INTO "mailboxes" VALUES(6,'default','dell',1,1735689602615039,1735689602615040,1735689602617128,0,0);
INSERT INTO "mailboxes" VALUES(7,'default','team',0,NULL,1735689602615040,1735689602617128,0,0);
INSERT INTO "mailboxes" VALUES(8,'lab','all',0,NULL,1735689602619730,1735689602621330,0,0);
INSERT INTO "mailboxes" VALUES(9,'lab','nano',1,1735689602618723,1735689602619730,1735689602621330,0,0);
INSERT INTO "mailboxes" VALUES(10,'default','array',0,NULL,0,0,0,0);
INSERT INTO "mailboxes" VALUES(11,'default','texts',0,NULL,0,0,0,0);
INSERT INTO "mailboxes" VALUES(12,'default','keys',0,NULL,0,0,0,0);
INSERT INTO "mailboxes" VALUES(13,'default','keys-too',0,NULL,0,0,0,0);
INSERT INTO "mailboxes" VALUES(14,'lab','keys',0,NULL,0,0,0,0);
INSERT INTO "mailboxes" VALUES(15,'default','short',0,NULL,0,0,0,0);
INSERT INTO "mailboxes" VALUES(16,'default','spark',0,NULL,0,0,0,0);
INSERT INTO "mailboxes" VALUES(17,'default','recalled',0,NULL,0,0,0,0);
INSERT INTO "mailboxes" VALUES(18,'default','queue',0,NULL,1735689602642306,1735689602652659,0,1735689602642306);
INSERT INTO "mailboxes" VALUES(19,'default','failing',0,NULL,1735689602654689,1735689602663240,0,1735689602654689);
INSERT INTO "mailboxes" VALUES(20,'default','failing.dead',0,NULL,0,0,0,0);
INSERT INTO "mailboxes" VALUES(21,'default','last-try',0,NULL,1735689602665717,1735689602676390,0,1735689602665717);
CREATE TABLE messages(
        tick INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, n INTEGER NOT NULL, sender TEXT NOT NULL,
        key TEXT, expires INTEGER, depth INTEGER NOT NULL, sum INTEGER NOT NULL, text TEXT NOT NULL, answers INTEGER, thread INTEGER);
INSERT INTO "messages" VALUES(1735689602599965,1,1,'spark',NULL,NULL,0,454824474,'"from": "spark", "channel": "default", "msg": "new 0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602602419,1,2,'spark',NULL,NULL,0,1027477283,'"from": "spark", "channel": "default", "msg": "new 1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602603789,3,1,'spark',NULL,NULL,0,2241504687,'"from": "spark", "channel": "default", "msg": "message 0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602605029,4,1,'spark',NULL,NULL,0,2578210423,'"from": "spark", "channel": "default", "msg": "message 0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602606202,5,1,'dell',NULL,NULL,0,2268802160,'"from": "dell", "channel": "default", "msg": "message 0", "subject": "S0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602607299,3,2,'spark',NULL,NULL,0,660338915,'"from": "spark", "channel": "default", "msg": "message 1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602608160,4,2,'spark',NULL,NULL,0,3442585304,'"from": "spark", "channel": "default", "msg": "message 1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602609123,5,2,'dell',NULL,NULL,0,4214905091,'"from": "dell", "channel": "default", "msg": "message 1", "subject": "S1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602610078,3,3,'spark',NULL,NULL,0,1249037379,'"from": "spark", "channel": "default", "msg": "message 2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602610898,4,3,'spark',NULL,NULL,0,1869785665,'"from": "spark", "channel": "default", "msg": "message 2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602611660,5,3,'dell',NULL,NULL,0,3642767654,'"from": "dell", "channel": "default", "msg": "message 2", "subject": "S2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602615039,6,1,'spark',NULL,NULL,0,3079955008,'"from": "spark", "channel": "default", "msg": "to two", "priority": "high"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602615040,7,1,'spark',NULL,NULL,0,4274711305,'"from": "spark", "channel": "default", "msg": "to two", "priority": "high"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602617771,7,2,'spark',NULL,NULL,0,567316572,'"from": "spark", "channel": "default", "msg": "for the group"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602618723,8,1,'dell',NULL,NULL,0,1665448150,'"from": "dell", "channel": "lab", "msg": "hear me"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602619730,9,1,'dell',NULL,NULL,0,93104078,'"from": "dell", "channel": "lab", "msg": "on another channel"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602622015,10,1,'dell',NULL,NULL,0,125124925,'"from": "dell", "channel": "default", "msg": "0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602622016,10,2,'dell',NULL,NULL,0,1592582745,'"from": "dell", "channel": "default", "msg": "1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602622017,10,3,'dell',NULL,NULL,0,703814391,'"from": "dell", "channel": "default", "msg": "2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602623550,11,1,'spark',NULL,NULL,0,2563363114,'"from": "spark", "channel": "default", "msg": "line one\n\ttab \"quotes\" \\ '' / \u00e9 \u4e2d \ud83d\udc1d \u2028 -- ; );\n", "x-new": [1, {"a": null, "b": [true, 1.5, -7, "\u00e9"]}], "Msg": "", "type": "result", "content_type": "text/markdown"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602624542,12,1,'spark','k-1',NULL,0,3590779977,'"from": "spark", "channel": "default", "msg": "once"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602625824,12,2,'spark','k-2',NULL,0,3661279691,'"from": "spark", "channel": "default", "msg": "to both"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602625825,13,1,'spark','k-2',NULL,0,3577574014,'"from": "spark", "channel": "default", "msg": "to both"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602626964,14,1,'dell','k-1',NULL,0,2222739428,'"from": "dell", "channel": "lab", "msg": "elsewhere", "subject": "S"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602628131,15,1,'spark',NULL,1735689602629131,0,3879762803,'"from": "spark", "channel": "default", "msg": "gone", "ttl": 0.001',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602629285,15,2,'spark',NULL,2735689602629285,0,129241769,'"from": "spark", "channel": "default", "msg": "lasting", "ttl": 1000000000.0',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602630202,6,2,'spark',NULL,NULL,0,327820854,'"from": "spark", "channel": "default", "msg": "a question"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602631487,16,1,'dell',NULL,NULL,1,2522000799,'"from": "dell", "channel": "default", "msg": "an answer", "reply_to": "62a99ba34823a"',1735689602630202,1735689602630202);
INSERT INTO "messages" VALUES(1735689602632743,6,3,'spark','thanks',NULL,2,352514641,'"from": "spark", "channel": "default", "msg": "thank you", "reply_to": "62a99ba34873f"',1735689602631487,1735689602630202);
INSERT INTO "messages" VALUES(1735689602633780,16,2,'dell',NULL,NULL,1,594554574,'"from": "dell", "channel": "default", "msg": "another answer", "reply_to": "62a99ba34823a"',1735689602630202,1735689602630202);
INSERT INTO "messages" VALUES(1735689602635115,17,1,'spark','k-3',1,0,2700794594,'"from": "spark", "channel": "default", "msg": "never mind"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602636418,17,2,'spark',NULL,NULL,0,1734526619,'"from": "spark", "channel": "default", "msg": "this one stays"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602638435,18,1,'spark',NULL,NULL,0,4191516197,'"from": "spark", "channel": "default", "msg": "done", "subject": "job done"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602639505,18,2,'spark',NULL,NULL,0,221239888,'"from": "spark", "channel": "default", "msg": "given back", "subject": "job given back"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602640478,18,3,'spark',NULL,NULL,0,349461916,'"from": "spark", "channel": "default", "msg": "later", "subject": "job later"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602641458,18,4,'spark',NULL,NULL,0,3969217215,'"from": "spark", "channel": "default", "msg": "out", "subject": "job out"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602642306,18,5,'spark',NULL,NULL,0,821134745,'"from": "spark", "channel": "default", "msg": "extended", "subject": "job extended"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602643082,18,6,'spark',NULL,NULL,0,531235935,'"from": "spark", "channel": "default", "msg": "waits", "subject": "job waits"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602654689,19,1,'spark',NULL,NULL,0,3529495950,'"from": "spark", "channel": "default", "msg": "failing, five times", "subject": "S"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602664386,20,1,'spark',NULL,NULL,0,2303484016,'"from": "spark", "channel": "default", "msg": "failing, five times", "subject": "S", "dead_of": "62a99ba34e1e1", "attempts": 5, "reason": "it does not compile"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602665717,21,1,'spark',NULL,NULL,0,3672476462,'"from": "spark", "channel": "default", "msg": "last-try, five times", "subject": "S"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602677533,6,4,'spark','ask-1',NULL,0,205246724,'"from": "spark", "channel": "default", "msg": "anybody?"',NULL,NULL);
CREATE TABLE receipts(
        mailbox INTEGER NOT NULL, kind INTEGER NOT NULL, tick INTEGER NOT NULL,
        reader TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY(mailbox, kind, tick)) WITHOUT ROWID;
INSERT INTO "receipts" VALUES(1,0,1735689600984899,'pruned',1735689600986269);
INSERT INTO "receipts" VALUES(2,0,1735689600984899,'pruned',1735689600986277);
INSERT INTO "receipts" VALUES(2,0,1735689602615040,'dell',1735689602616706);
INSERT INTO "receipts" VALUES(4,0,1735689602608160,'fetched-only',1735689602613138);
INSERT INTO "receipts" VALUES(5,0,1735689602611660,'half-way',1735689602613821);
INSERT INTO "receipts" VALUES(5,1,1735689602609123,'half-way',1735689602614343);
INSERT INTO "receipts" VALUES(6,0,1735689602615040,'dell',1735689602616696);
INSERT INTO "receipts" VALUES(6,1,1735689602615039,'dell',1735689602617145);
INSERT INTO "receipts" VALUES(7,0,1735689602615040,'dell',1735689602616702);
INSERT INTO "receipts" VALUES(8,0,1735689602619730,'nano',1735689602620907);
INSERT INTO "receipts" VALUES(9,0,1735689602619730,'nano',1735689602620902);
INSERT INTO "receipts" VALUES(9,1,1735689602618723,'nano',1735689602621346);
INSERT INTO "receipts" VALUES(18,0,1735689602642306,'dell',1735689602653225);
INSERT INTO "receipts" VALUES(19,0,1735689602654689,'nano',1735689602656264);
INSERT INTO "receipts" VALUES(21,0,1735689602665717,'nano',1735689602667851);
CREATE TABLE uses(token TEXT PRIMARY KEY, used INTEGER NOT NULL);
CREATE TABLE work(
        tick INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, attempt INTEGER NOT NULL,
        due INTEGER,                         -- when it can be had again, us; NULL when it is done or dead
        lease TEXT,                          -- of who has it; NULL when it was given back, or is dead
        worker TEXT NOT NULL, reason TEXT);
INSERT INTO "work" VALUES(1735689602638435,18,1,NULL,'3a01a377b3003c2f','dell',NULL);
INSERT INTO "work" VALUES(1735689602639505,18,1,1735689603147926,NULL,'dell','not mine');
INSERT INTO "work" VALUES(1735689602640478,18,1,1735693202650495,NULL,'dell','a worker gave it back');
INSERT INTO "work" VALUES(1735689602641458,18,1,1735689662651435,'0235d2580da32153','dell',NULL);
INSERT INTO "work" VALUES(1735689602642306,18,1,1735696802653877,'7123e72335ec5b70','dell',NULL);
INSERT INTO "work" VALUES(1735689602654689,19,5,NULL,NULL,'nano','it does not compile');
INSERT INTO "work" VALUES(1735689602665717,21,5,1735689662676415,'88dd3e63317a400b','nano',NULL);
CREATE INDEX in_order ON messages(mailbox, tick);
CREATE INDEX retries ON messages(key, sender) WHERE key IS NOT NULL;
CREATE INDEX expiring ON messages(mailbox, expires, tick) WHERE expires IS NOT NULL;
CREATE VIEW readable AS SELECT datetime(tick / 1000000, 'unixepoch') AS time, channel, sender, name AS "to",
        json_extract('{' || text || '}', '$.msg') AS msg FROM messages JOIN mailboxes ON mailbox = id;
CREATE INDEX threads ON messages(thread, tick) WHERE thread IS NOT NULL;
CREATE INDEX undone ON work(mailbox, due) WHERE due IS NOT NULL;
COMMIT;
PRAGMA user_version=2;
