BEGIN TRANSACTION;
CREATE TABLE bus(id TEXT NOT NULL, last INTEGER NOT NULL, lost INTEGER NOT NULL DEFAULT 0);
INSERT INTO "bus" VALUES('9865a52d816f42da',1735689600504229,0);
CREATE TABLE extensions(name TEXT PRIMARY KEY, version INTEGER NOT NULL, noun TEXT NOT NULL);
INSERT INTO "extensions" VALUES('work',1,'jobs');
CREATE TABLE mailboxes(
        id INTEGER PRIMARY KEY, channel TEXT NOT NULL, name TEXT NOT NULL,
        own INTEGER NOT NULL DEFAULT 0,      -- somebody reads it as their own, first name
        read INTEGER,                        -- highest cursor its owner presented; NULL before the first
        fetched INTEGER NOT NULL DEFAULT 0,  -- highest tick in an answer that was written out
        seen INTEGER NOT NULL DEFAULT 0,     -- wall clock of the last poll, us
        removed INTEGER NOT NULL DEFAULT 0, taken INTEGER NOT NULL DEFAULT 0, gone INTEGER NOT NULL DEFAULT 0,  -- highest tick that retention removed
        UNIQUE(channel, name));
INSERT INTO "mailboxes" VALUES(1,'default','pruned',1,1735689600496585,1735689600504229,1735689600509725,1735689600504229,0,4);
INSERT INTO "mailboxes" VALUES(2,'default','never-read',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(3,'default','fetched-only',1,0,1735689602354716,1735689602363345,0,0,0);
INSERT INTO "mailboxes" VALUES(4,'default','half-way',1,1735689602356865,1735689602361509,1735689602366261,0,0,0);
INSERT INTO "mailboxes" VALUES(5,'default','dell',1,1735689602367583,1735689602367584,1735689602370716,0,0,0);
INSERT INTO "mailboxes" VALUES(6,'default','team',0,NULL,1735689602367584,1735689602370716,0,0,0);
INSERT INTO "mailboxes" VALUES(7,'lab','all',0,NULL,1735689602375064,1735689602377558,0,0,0);
INSERT INTO "mailboxes" VALUES(8,'lab','nano',1,1735689602373461,1735689602375064,1735689602377558,0,0,0);
INSERT INTO "mailboxes" VALUES(9,'default','array',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(10,'default','texts',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(11,'default','keys',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(12,'default','keys-too',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(13,'lab','keys',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(14,'default','short',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(15,'default','spark',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(16,'default','recalled',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(17,'default','queue',0,NULL,1735689602412386,1735689602426827,0,1735689602412386,0);
INSERT INTO "mailboxes" VALUES(18,'default','failing',0,NULL,1735689602430127,1735689602444242,0,1735689602430127,0);
INSERT INTO "mailboxes" VALUES(19,'default','failing.dead',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(20,'default','last-try',0,NULL,1735689602447601,1735689602460711,0,1735689602447601,0);
CREATE TABLE messages(
        tick INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, n INTEGER NOT NULL, sender TEXT NOT NULL,
        key TEXT, expires INTEGER, depth INTEGER NOT NULL, sum INTEGER NOT NULL, text TEXT NOT NULL, answers INTEGER, thread INTEGER);
INSERT INTO "messages" VALUES(1735689602343651,1,5,'spark',NULL,NULL,0,3214936465,'"from": "spark", "channel": "default", "msg": "new 0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602345611,1,6,'spark',NULL,NULL,0,3055275055,'"from": "spark", "channel": "default", "msg": "new 1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602347866,2,1,'spark',NULL,NULL,0,1923258419,'"from": "spark", "channel": "default", "msg": "message 0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602349610,3,1,'spark',NULL,NULL,0,3101034795,'"from": "spark", "channel": "default", "msg": "message 0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602351415,4,1,'dell',NULL,NULL,0,3501173566,'"from": "dell", "channel": "default", "msg": "message 0", "subject": "S0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602353022,2,2,'spark',NULL,NULL,0,424868947,'"from": "spark", "channel": "default", "msg": "message 1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602354716,3,2,'spark',NULL,NULL,0,2295998691,'"from": "spark", "channel": "default", "msg": "message 1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602356865,4,2,'dell',NULL,NULL,0,2373924332,'"from": "dell", "channel": "default", "msg": "message 1", "subject": "S1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602358473,2,3,'spark',NULL,NULL,0,3773795103,'"from": "spark", "channel": "default", "msg": "message 2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602359943,3,3,'spark',NULL,NULL,0,2647947320,'"from": "spark", "channel": "default", "msg": "message 2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602361509,4,3,'dell',NULL,NULL,0,2436419684,'"from": "dell", "channel": "default", "msg": "message 2", "subject": "S2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602367583,5,1,'spark',NULL,NULL,0,189065593,'"from": "spark", "channel": "default", "msg": "to two", "priority": "high"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602367584,6,1,'spark',NULL,NULL,0,154316639,'"from": "spark", "channel": "default", "msg": "to two", "priority": "high"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602371937,6,2,'spark',NULL,NULL,0,388430086,'"from": "spark", "channel": "default", "msg": "for the group"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602373461,7,1,'dell',NULL,NULL,0,3011484896,'"from": "dell", "channel": "lab", "msg": "hear me"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602375064,8,1,'dell',NULL,NULL,0,3406362693,'"from": "dell", "channel": "lab", "msg": "on another channel"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602378692,9,1,'dell',NULL,NULL,0,3559253346,'"from": "dell", "channel": "default", "msg": "0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602378693,9,2,'dell',NULL,NULL,0,2168713210,'"from": "dell", "channel": "default", "msg": "1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602378694,9,3,'dell',NULL,NULL,0,3814501712,'"from": "dell", "channel": "default", "msg": "2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602380467,10,1,'spark',NULL,NULL,0,2782764350,'"from": "spark", "channel": "default", "msg": "line one\n\ttab \"quotes\" \\ '' / \u00e9 \u4e2d \ud83d\udc1d \u2028 -- ; );\n", "x-new": [1, {"a": null, "b": [true, 1.5, -7, "\u00e9"]}], "Msg": "", "type": "result", "content_type": "text/markdown"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602382234,11,1,'spark','k-1',NULL,0,683833909,'"from": "spark", "channel": "default", "msg": "once"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602384366,11,2,'spark','k-2',NULL,0,2023715876,'"from": "spark", "channel": "default", "msg": "to both"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602384367,12,1,'spark','k-2',NULL,0,669908435,'"from": "spark", "channel": "default", "msg": "to both"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602386097,13,1,'dell','k-1',NULL,0,535920608,'"from": "dell", "channel": "lab", "msg": "elsewhere", "subject": "S"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602388334,14,1,'spark',NULL,1735689602389334,0,1283797231,'"from": "spark", "channel": "default", "msg": "gone", "ttl": 0.001',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602389773,14,2,'spark',NULL,2735689602389773,0,2727139031,'"from": "spark", "channel": "default", "msg": "lasting", "ttl": 1000000000.0',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602392179,5,2,'spark',NULL,NULL,0,4262193489,'"from": "spark", "channel": "default", "msg": "a question"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602394268,15,1,'dell',NULL,NULL,1,1070579805,'"from": "dell", "channel": "default", "msg": "an answer", "reply_to": "62a99ba30e073"',1735689602392179,1735689602392179);
INSERT INTO "messages" VALUES(1735689602397651,5,3,'spark','thanks',NULL,2,2839581625,'"from": "spark", "channel": "default", "msg": "thank you", "reply_to": "62a99ba30e89c"',1735689602394268,1735689602392179);
INSERT INTO "messages" VALUES(1735689602399680,15,2,'dell',NULL,NULL,1,314466858,'"from": "dell", "channel": "default", "msg": "another answer", "reply_to": "62a99ba30e073"',1735689602392179,1735689602392179);
INSERT INTO "messages" VALUES(1735689602401138,16,1,'spark','k-3',1,0,3343337334,'"from": "spark", "channel": "default", "msg": "never mind"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602402704,16,2,'spark',NULL,NULL,0,2923490877,'"from": "spark", "channel": "default", "msg": "this one stays"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602406159,17,1,'spark',NULL,NULL,0,1888558021,'"from": "spark", "channel": "default", "msg": "done", "subject": "job done"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602407826,17,2,'spark',NULL,NULL,0,156765218,'"from": "spark", "channel": "default", "msg": "given back", "subject": "job given back"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602409393,17,3,'spark',NULL,NULL,0,3027892749,'"from": "spark", "channel": "default", "msg": "later", "subject": "job later"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602410975,17,4,'spark',NULL,NULL,0,999912541,'"from": "spark", "channel": "default", "msg": "out", "subject": "job out"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602412386,17,5,'spark',NULL,NULL,0,3400429929,'"from": "spark", "channel": "default", "msg": "extended", "subject": "job extended"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602413704,17,6,'spark',NULL,NULL,0,689886842,'"from": "spark", "channel": "default", "msg": "waits", "subject": "job waits"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602430127,18,1,'spark',NULL,NULL,0,2354188474,'"from": "spark", "channel": "default", "msg": "failing, five times", "subject": "S"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602445753,19,1,'spark',NULL,NULL,0,3205147008,'"from": "spark", "channel": "default", "msg": "failing, five times", "subject": "S", "dead_of": "62a99ba3174af", "attempts": 5, "reason": "it does not compile"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602447601,20,1,'spark',NULL,NULL,0,2341449648,'"from": "spark", "channel": "default", "msg": "last-try, five times", "subject": "S"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602462648,5,4,'spark','ask-1',NULL,0,4277420240,'"from": "spark", "channel": "default", "msg": "anybody?"',NULL,NULL);
CREATE TABLE receipts(
        mailbox INTEGER NOT NULL, kind INTEGER NOT NULL, tick INTEGER NOT NULL,
        reader TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY(mailbox, kind, tick)) WITHOUT ROWID;
INSERT INTO "receipts" VALUES(1,0,1735689600504229,'pruned',1735689600509276);
INSERT INTO "receipts" VALUES(3,0,1735689602354716,'fetched-only',1735689602364690);
INSERT INTO "receipts" VALUES(4,0,1735689602361509,'half-way',1735689602365885);
INSERT INTO "receipts" VALUES(4,1,1735689602356865,'half-way',1735689602366284);
INSERT INTO "receipts" VALUES(5,0,1735689602367584,'dell',1735689602370346);
INSERT INTO "receipts" VALUES(5,1,1735689602367583,'dell',1735689602370850);
INSERT INTO "receipts" VALUES(6,0,1735689602367584,'dell',1735689602370358);
INSERT INTO "receipts" VALUES(7,0,1735689602375064,'nano',1735689602377200);
INSERT INTO "receipts" VALUES(8,0,1735689602375064,'nano',1735689602377191);
INSERT INTO "receipts" VALUES(8,1,1735689602373461,'nano',1735689602377577);
INSERT INTO "receipts" VALUES(17,0,1735689602412386,'dell',1735689602427629);
INSERT INTO "receipts" VALUES(18,0,1735689602430127,'nano',1735689602433665);
INSERT INTO "receipts" VALUES(20,0,1735689602447601,'nano',1735689602449748);
CREATE TABLE uses(token TEXT PRIMARY KEY, used INTEGER NOT NULL);
CREATE TABLE work(
        tick INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, attempt INTEGER NOT NULL,
        due INTEGER,                         -- when it can be had again, us; NULL when it is done or dead
        lease TEXT,                          -- of who has it; NULL when it was given back, or is dead
        worker TEXT NOT NULL, reason TEXT);
INSERT INTO "work" VALUES(1735689602406159,17,1,NULL,'63ee1bcc7f070e27','dell',NULL);
INSERT INTO "work" VALUES(1735689602407826,17,1,1735689602920581,NULL,'dell','not mine');
INSERT INTO "work" VALUES(1735689602409393,17,1,1735693202423667,NULL,'dell','a worker gave it back');
INSERT INTO "work" VALUES(1735689602410975,17,1,1735689662425076,'b7757126a27477d9','dell',NULL);
INSERT INTO "work" VALUES(1735689602412386,17,1,1735696802428712,'03b09a138fb9a628','dell',NULL);
INSERT INTO "work" VALUES(1735689602430127,18,5,NULL,NULL,'nano','it does not compile');
INSERT INTO "work" VALUES(1735689602447601,20,5,1735689662460764,'9289128a5c893a2e','nano',NULL);
CREATE INDEX in_order ON messages(mailbox, tick);
CREATE INDEX retries ON messages(key, sender) WHERE key IS NOT NULL;
CREATE INDEX expiring ON messages(mailbox, expires, tick) WHERE expires IS NOT NULL;
CREATE VIEW readable AS SELECT datetime(tick / 1000000, 'unixepoch') AS time, channel, sender, name AS "to",
        json_extract('{' || text || '}', '$.msg') AS msg FROM messages JOIN mailboxes ON mailbox = id;
CREATE INDEX threads ON messages(thread, tick) WHERE thread IS NOT NULL;
CREATE INDEX undone ON work(mailbox, due) WHERE due IS NOT NULL;
CREATE VIEW work_kept AS SELECT tick FROM work WHERE due IS NOT NULL UNION ALL
        SELECT tick FROM messages JOIN mailboxes ON mailbox = id WHERE taken > 0 AND tick > taken;
CREATE TRIGGER work_removed AFTER DELETE ON messages BEGIN DELETE FROM work WHERE tick = old.tick; END;
COMMIT;
PRAGMA user_version=3;
